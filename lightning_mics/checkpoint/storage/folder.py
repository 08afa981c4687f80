"""Where a checkpoint lives, and how it becomes visible: all of it at once, in place of what was there.

On a file system that renames at once. A new checkpoint is whole and on disk before it replaces an earlier one::

    .NAME.unfinished    being written
    .NAME.former        what was at NAME, between the two renames; a job killed there finds it when it loads or saves
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, exists

META_FILE = "meta.pt"


DCP_FILE = ".metadata"


def is_sharded(path: StoragePath) -> bool:
    """Whether ``path`` is a directory that :func:`~lightning_mics.checkpoint.saving.save_sharded` wrote."""
    return any(exists(path / name) for name in (META_FILE, MANIFEST_FILE))


@dataclass(frozen=True)
class CheckpointFolder:
    """The place of one checkpoint on a file system; one rank calls, the others wait for it.

    Saving is ``draft = begin()``, then every rank writes its files into ``draft``, then ``publish(draft, manifest)``.

    Attributes:
        path: Where the checkpoint is seen.
    """

    path: Path

    @property
    def _former(self) -> Path:
        return self.path.with_name(f".{self.path.name}.former")

    def begin(self) -> Path:
        """Make the empty folder that a new checkpoint is written into, and clear away what a killed job has left."""
        draft = self.path.with_name(f".{self.path.name}.unfinished")
        self.put_back()
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def publish(self, draft: Path, manifest: Manifest) -> None:
        """Let the files in ``draft``, which ``manifest`` lists, be the checkpoint; foreign files at its place stay."""
        try:
            manifest.write(draft)
            for name in (META_FILE, MANIFEST_FILE, "."):  # DCP has seen to its own
                _sync(draft / name)
        except OSError:
            self.abandon(draft)
            raise
        if os.path.lexists(self.path):
            self.path.rename(self._former)
        try:
            draft.rename(self.path)
        finally:
            self.put_back()
        _sync(self.path.parent)

    def abandon(self, draft: Path) -> None:
        """Remove ``draft``, which will not be published, as far as that is possible."""
        shutil.rmtree(draft, ignore_errors=True)

    def replace_by_file(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` put one file in the checkpoint's place.

        Raises:
            IsADirectoryError: If anything else than a checkpoint is there.
        """
        self.put_back()
        if self.path.is_dir():
            if not is_sharded(self.path) or any(map(_is_foreign, self.path.iterdir())):
                what = f"{self.path} is a directory that holds other files than a checkpoint's"
                raise IsADirectoryError(errno.EISDIR, what)
            self.path.rename(self._former)
        try:
            write(self.path)
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Keep what waits for its successor: all of it if none came, else the files that are not a checkpoint's."""
        path, former = self.path, self._former
        if not os.path.lexists(former):
            return
        if not os.path.lexists(path):
            former.rename(path)
        elif former.is_dir() and not former.is_symlink():
            for entry in filter(_is_foreign, list(former.iterdir())):
                entry.rename(path / entry.name)
            shutil.rmtree(former)
        else:
            former.unlink()


def _is_foreign(entry: Path) -> bool:
    return entry.suffix != ".distcp" and entry.name not in (META_FILE, MANIFEST_FILE, DCP_FILE)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
