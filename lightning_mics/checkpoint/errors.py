"""The errors of checkpoints, and their messages."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.checkpoint.api import CheckpointException

from lightning_mics._torch.process_groups import was_left_waiting


@contextmanager
def saving(path: object) -> Iterator[None]:
    """Give errors of what runs in it the checkpoint's name, the same on all ranks.

    Raises:
        OSError: If storage has failed, with the ``errno`` of that.
        RuntimeError: If anything else has.
    """
    try:
        yield
    except CheckpointException as failed:  # torch's own is no Exception, and as long as all tracebacks
        rank, (error, _) = min(failed.failures.items())
        raise _not_saved(path, error, where=f" on rank {rank}") from failed
    except Exception as error:
        raise _not_saved(path, error) from error


def os_error(what: str, error: BaseException) -> OSError:
    """An error of storage, whatever a driver has made of it, that other ranks can be told."""
    number = getattr(error, "errno", None)
    message = f"{what}: {_in_words(error)}"
    return OSError(number, message) if isinstance(number, int) else OSError(message)


def _not_saved(path: object, error: BaseException, *, where: str = "") -> Exception:
    what = f"checkpoint {path} was not saved, and earlier ones are as they were; what failed{where}"
    return os_error(what, error) if isinstance(error, OSError) else RuntimeError(f"{what}: {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) or repr(error)


class SilentRankError(RuntimeError):
    """A rank did not take part in saving or loading a checkpoint within the timeout."""

    __module__ = "lightning_mics.checkpoint"  # what a traceback says is what can be imported


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


class DamagedCheckpointError(RuntimeError):
    """A checkpoint has lost a file or a part of one, or a file is not what was written."""

    __module__ = "lightning_mics.checkpoint"  # what a traceback says is what can be imported
    raised_by_all_ranks = True  # as it is, where one rank finds it: see `collectives.agreement`


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint holds more than data: loading it would run code."""

    __module__ = "lightning_mics.checkpoint"  # what a traceback says is what can be imported
