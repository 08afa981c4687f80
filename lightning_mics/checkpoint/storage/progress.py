"""A progress bar for checkpoints that take long to save or load; short ones show none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

DELAY_SECONDS = 3.0  # until a bar appears


@contextmanager
def progress_bar(label: str, *, total_bytes: int, enabled: bool) -> Iterator[Callable[[int], object]]:
    """Show the progress of an operation that takes longer than :data:`DELAY_SECONDS`.

    Args:
        label: Text of the bar.
        total_bytes: Bytes at completion.
        enabled: Whether this rank displays the bar.

    Returns:
        A function to call with the number of bytes completed since the last call.
    """
    with tqdm(
        total=total_bytes, desc=label, unit="B", unit_scale=True, delay=DELAY_SECONDS, leave=False, disable=not enabled
    ) as bar:
        yield bar.update


def no_progress(_done_bytes: int) -> None:
    """Progress callback that does nothing."""
