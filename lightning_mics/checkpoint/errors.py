"""The errors of checkpoints, and their messages."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.checkpoint.api import CheckpointException

from lightning_mics._torch.process_groups import was_left_waiting
from lightning_mics.collectives.control_plane import MissingRanksError, RanksDifferError


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is corrupted: a file is missing, cut short or altered."""

    __module__ = "lightning_mics.checkpoint"  # tracebacks show the public path
    raised_by_all_ranks = True  # unchanged, if one rank finds it: see `collectives.agreement`
    comes_again = False  # if the job is started again: see `in_memory.launcher`


class CheckpointMismatchError(RuntimeError):
    """The model or the optimizers of the job are not those of the checkpoint."""

    __module__ = "lightning_mics.checkpoint"  # tracebacks show the public path
    comes_again = True  # if the job is started again: see `in_memory.launcher`


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint holds more than data: loading it would run code."""

    __module__ = "lightning_mics.checkpoint"  # tracebacks show the public path
    comes_again = True  # if the job is started again: see `in_memory.launcher`


class SilentRankError(RuntimeError):
    """A rank did not take part in saving or loading a checkpoint within the timeout."""

    __module__ = "lightning_mics.checkpoint"  # tracebacks show the public path


@contextmanager
def all_ranks_answer(what: str, *, timeout: timedelta | None) -> Generator[None]:
    """Raise one kind of error where a collective inside the context times out.

    Args:
        what: Operation of all ranks and path of the checkpoint, such as "saving last.ckpt"; for the message.
        timeout: Timeout of the process group, for the message; None is torch's default.

    Raises:
        SilentRankError: If a rank did not take part.
    """
    try:
        yield
    except RuntimeError as error:
        if not was_left_waiting(error):
            raise
        known = f" ({error.found})" if isinstance(error, MissingRanksError) else ""
        limit = "torch's default timeout" if timeout is None else f"timeout={timeout.total_seconds():g} s"
        raise SilentRankError(
            f"{what} failed: at least one rank did not answer within {limit}; it hangs or has died, so look for the "
            f"rank that does not report this error{known}. Checkpoints that were complete before are unchanged. If "
            "ranks need longer than that, give the strategy a larger timeout"
        ) from error


@contextmanager
def saving(path: object) -> Iterator[None]:
    """Give errors inside the context the checkpoint's name and the same type on all ranks.

    Raises:
        OSError: If storage has failed, with the same ``errno``.
        RuntimeError: If anything else has failed.
    """
    try:
        yield
    except RanksDifferError:
        raise
    except CheckpointException as failed:  # a BaseException, whose message holds the tracebacks of all ranks
        rank, (error, _) = min(failed.failures.items())
        raise _not_saved(path, error, where=f" on rank {rank}") from failed
    except Exception as error:
        raise _not_saved(path, error) from error


def os_error(what: str, error: BaseException) -> OSError:
    """An error of storage that can be pickled for other ranks, whatever type the driver has raised.

    Args:
        what: Operation that failed; the beginning of the message.
        error: The driver's error, whose ``errno`` and message are kept.
    """
    number = getattr(error, "errno", None)
    message = f"{what}: {_in_words(error)}"
    return OSError(number, message) if isinstance(number, int) else OSError(message)


def _not_saved(path: object, error: BaseException, *, where: str = "") -> Exception:
    what = f"checkpoint {path} was not saved, and earlier ones are unchanged; what failed{where}"
    return os_error(what, error) if isinstance(error, OSError) else RuntimeError(f"{what}: {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) or repr(error)
