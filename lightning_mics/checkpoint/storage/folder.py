"""The location of a checkpoint on a file system, where a rename is atomic; in a store see
:mod:`~lightning_mics.checkpoint.storage.store`.

[Note: How a checkpoint becomes visible]

At any time, and after a crash at any point, a path holds one complete checkpoint or none:

1. All ranks write their files into a draft, where nobody looks for a checkpoint.
2. When all have finished, rank 0 writes the manifest: the list of the files with their sizes and checksums.
3. One atomic operation makes the draft the checkpoint. On a file system it is the rename of the draft, after its files
   have been synchronized to disk; in a store, which cannot rename, it is the write of the manifest, which names the
   folder of the draft.
4. The earlier checkpoint is removed; files that are not a checkpoint's are preserved.

On a file system there are two renames, since a directory cannot be replaced by one::

    .NAME.unfinished    the draft
    .NAME.former        the earlier checkpoint between the two renames; a job that was killed there finds it when it
                        loads or saves next (`recover`)
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
