"""What is said when a checkpoint cannot be saved: which, why, and that earlier ones are unharmed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from lightning_mics.storage_path import StoragePath


@contextmanager
def saving(path: StoragePath) -> Iterator[None]:
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


def _not_saved(path: StoragePath, error: BaseException, *, where: str = "") -> Exception:
    what = f"checkpoint {path} was not saved, and earlier ones are as they were; what failed{where}"
    return os_error(what, error) if isinstance(error, OSError) else RuntimeError(f"{what}: {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error) or repr(error)
