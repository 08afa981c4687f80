"""The location of a checkpoint on a file system, and how a checkpoint replaces an earlier one.

[Note: How a checkpoint becomes visible]

The path of a sharded checkpoint holds a complete one or none at any time: after a crash, after a failed save, while a
save runs. Every rank writes its files to a place that no reader looks at; once all ranks have finished, rank 0 writes
the manifest, which lists all files, and makes them visible by one atomic operation. There are two kinds of storage::

                         a file system (CheckpointFolder)         an object store (CheckpointStore)
    files are written    in .NAME.unfinished                      in NAME/TIME-RANDOM
    the manifest         in .NAME.unfinished, synced to disk      NAME/manifest.json, which names TIME-RANDOM
    becomes visible by   the rename of .NAME.unfinished to NAME   writing the manifest, as one object
    the earlier one      is renamed to .NAME.former before,       is there until then, and removed after
                         and removed after
    killed before        the earlier one is visible, and the next save removes the files
    killed in between    .NAME.former is renamed to NAME by       cannot be: one object is replaced
                         `recover`, in the next load or save
    killed after         the new one is visible, and the next save, or on a file system load, removes the earlier one

One full file is as atomic as the function that writes it; a directory at its place is renamed to .NAME.former until it
is there. Files in NAME that belong to no checkpoint are never removed: they are moved to the new directory, and make
one full file raise.
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

META_FILE = "meta.pt"  # entries that are not sharded
DCP_FILE = ".metadata"  # metadata of torch.distributed.checkpoint


def is_sharded(path: StoragePath) -> bool:
    """Whether ``path`` is a directory that :func:`~lightning_mics.checkpoint.saving.save_sharded` has written."""
    return any(exists(path / name) for name in (META_FILE, MANIFEST_FILE))


@dataclass(frozen=True)
class CheckpointFolder:
    """The location of one checkpoint on a file system; one rank calls, the others wait for it.

    To save, call ``draft = begin()``, let every rank write its files into ``draft``, then ``publish(draft, manifest)``.
    See [Note: How a checkpoint becomes visible].

    Attributes:
        path: Directory of the checkpoint.
    """

    path: Path

    @property
    def _former(self) -> Path:
        return self.path.with_name(f".{self.path.name}.former")

    def begin(self) -> Path:
        """Make an empty draft for a new checkpoint, and remove the remains of killed jobs."""
        draft = self.path.with_name(f".{self.path.name}.unfinished")
        self.recover()
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def publish(self, draft: Path, manifest: Manifest) -> None:
        """Make the draft the checkpoint; other files at its path are preserved.

        Args:
            draft: Folder from :meth:`begin`, with all files written.
            manifest: List of the files.
        """
        try:
            manifest.write(draft)
            for name in (META_FILE, MANIFEST_FILE, "."):  # DCP has synchronized its own
                _sync(draft / name)
        except OSError:
            self.abandon(draft)
            raise
        if os.path.lexists(self.path):
            self.path.rename(self._former)
        try:
            draft.rename(self.path)
        finally:
            self.recover()
        _sync(self.path.parent)

    def abandon(self, draft: Path) -> None:
        """Remove ``draft``, which will not be published, if possible."""
        shutil.rmtree(draft, ignore_errors=True)

    def replace_by_file(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` write a file at the checkpoint's path.

        Raises:
            IsADirectoryError: If it is a directory with other files than a checkpoint's.
        """
        self.recover()
        if self.path.is_dir():
            if not is_sharded(self.path) or any(map(_is_foreign, self.path.iterdir())):
                what = f"{self.path} is a directory that holds other files than a checkpoint's"
                raise IsADirectoryError(errno.EISDIR, what)
            self.path.rename(self._former)
        try:
            write(self.path)
        finally:
            self.recover()

    def recover(self) -> None:
        """Restore the earlier checkpoint if no successor came; otherwise move its other files to the successor."""
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
    """Wait until a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
