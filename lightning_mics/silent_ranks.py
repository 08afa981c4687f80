"""One error for a rank that hangs while a checkpoint is saved or loaded, whatever the others happened to wait in.

Collectives end with errors of their own when a rank does not take part within the process group's timeout, and when a
rank that has given up leaves. They name sockets; what whoever reads a log of hundreds of ranks needs is which
checkpoint it was and what has become of the others.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

from lightning_mics._torch_compat import was_left_waiting


class SilentRankError(RuntimeError):
    """A rank did not take part in saving or loading a checkpoint within the timeout."""


@contextmanager
def all_ranks_answer(what: str, *, timeout: timedelta | None) -> Generator[None]:
    """Raise one kind of error where a collective inside waits in vain.

    Args:
        what: What the ranks do together, with the checkpoint's path; for the message.
        timeout: Of the process group, for the message; None is torch's own.

    Raises:
        SilentRankError: If a rank did not take part.
    """
    try:
        yield
    except RuntimeError as error:
        if not was_left_waiting(error):
            raise
        limit = "torch's default timeout" if timeout is None else f"timeout={timeout.total_seconds():g} s"
        raise SilentRankError(
            f"{what} failed: at least one rank did not answer within {limit}; it hangs or has died, so look for the "
            "rank that does not report this error. Checkpoints that were complete before are as they were. If ranks "
            "need longer than that, give the strategy a larger timeout"
        ) from error
