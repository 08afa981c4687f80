"""A folder that is prepared once, whoever asks for it: other ranks, other nodes, other jobs.

A lock keeps all but one from the work, and a folder appears complete or not at all, for it is filled under another name
and renamed. So where a file system has no locks the work may be done twice, but no file is ever broken::

    CACHE/.NAME.lock       held while NAME is prepared; the system lets go of it when its holder dies
    CACHE/.NAME.abc123/    a draft
    CACHE/NAME/            prepared
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ABANDONED_SECONDS = 24 * 3600  # a draft that nobody has written to for so long is of a process that was killed


def cache_folder(cache_dir: str | Path, *, name: str, depends_on: Any) -> Path:
    """The folder for what is determined by ``depends_on`` (anything that json can write)."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir).expanduser() / f"{name}-{digest[:16]}"


def prepare_once(folder: Path, fill: Callable[[Path], None], *, say: Callable[[str], object] = print) -> None:
    """Make ``folder`` unless it is there; of several processes that ask for it at once, one does, and all return then.

    Args:
        folder: To be prepared.
        fill: Writes what belongs into it to the folder that it is given.
        say: Told what is being waited for.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock"), what=folder, say=say):
        if not folder.is_dir():
            _remove_abandoned(folder)
            _fill_and_rename(folder, fill)


@contextmanager
def _lock(path: Path, *, what: Path, say: Callable[[str], object]) -> Iterator[None]:
    lock = FileLock(path, fallback_to_soft=False)  # a soft one would outlive a holder that is killed
    try:
        _acquire(lock, what=what, say=say)
    except OSError as error:
        if error.errno not in (ENOSYS, ENOLCK, EOPNOTSUPP):
            raise
        say(f"{path.parent} is on a file system without locks ({error}): {what.name} may be prepared more than once")
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, *, what: Path, say: Callable[[str], object]) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that prepares {what} and holds {lock.lock_file}")
        lock.acquire(timeout=-1, poll_interval=0.5)


def _fill_and_rename(folder: Path, fill: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as unfinished:
        draft = Path(unfinished, "draft")
        draft.mkdir()
        fill(draft)
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():  # it is one if another process was first, where there are no locks
                raise


def _remove_abandoned(folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*/"):
        written = max((path.stat().st_mtime for path in left.rglob("*")), default=left.stat().st_mtime)
        if time.time() - written > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
