"""A progress bar for checkpoints that take long to save or load; short ones show none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

DELAY_SECONDS = 3.0  # until a bar appears


@contextmanager
def progress_bar(what: str, *, total_bytes: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show how far something is that takes longer than :data:`DELAY_SECONDS`.

    Args:
        what: It is, in two words.
        total_bytes: When it is done.
        shown: Whether by this rank, and at all.

    Returns:
        To be called with the bytes that have been done since the last call.
    """
    with tqdm(
        total=total_bytes, desc=what, unit="B", unit_scale=True, delay=DELAY_SECONDS, leave=False, disable=not shown
    ) as bar:
        yield bar.update


def unseen(_done_bytes: int) -> None:
    """Where nobody looks."""
