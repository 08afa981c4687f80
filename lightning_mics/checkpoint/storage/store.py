"""The location of a checkpoint in an object store, which cannot rename.

See [Note: How a checkpoint becomes visible]. Each save has a folder of its own, with a name that no other save has::

    NAME/manifest.json                      names the folder that holds the files
    NAME/20261125T103000-5f0c9a3e/...       the files
    NAME/20261125T110000-77e1b204/...       files of a save that is running, or of a job that was killed

Two jobs that save to the same NAME at the same time would remove each other's files.
"""

from __future__ import annotations

import errno
import re
import secrets
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from upath import UPath

from lightning_mics.checkpoint.errors import DamagedCheckpointError, os_error
from lightning_mics.checkpoint.storage.folder import DCP_FILE, META_FILE
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, exists, forget_listings

_FOLDER_OF_A_SAVE = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class CheckpointStore:
    """The location of one checkpoint in a store, with the methods of
    :class:`~lightning_mics.checkpoint.storage.folder.CheckpointFolder`.

    A job has at most one unfinished save at one location.

    Attributes:
        path: URL of the checkpoint.
    """

    path: UPath

    def begin(self) -> UPath:
        """Choose the folder of a new checkpoint, and remove the remains of killed jobs."""
        forget_listings(self.path)
        with suppress(DamagedCheckpointError):  # its files may be useful until the new ones are complete
            named = Manifest.read(self.path).folder if exists(self._manifest) else None
            self._remove(folder for folder in self._folders() if folder.name != named)
        return self.path / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"

    def publish(self, draft: StoragePath, manifest: Manifest) -> None:
        """Make the draft the checkpoint; other files at its URL are preserved.

        Args:
            draft: Folder from :meth:`begin`, with all files written.
            manifest: List of the files.
        """
        self._write(replace(manifest, folder=draft.name).text())
        try:
            forget_listings(self.path)
            self._remove(folder for folder in self._folders() if folder.name != draft.name)
            self._remove(self._plain_files())
            if self.path.is_file():
                self.path.unlink()
        except Exception as error:
            warnings.warn(f"files of an earlier checkpoint are left in {self.path}: {error!r}", stacklevel=2)

    def abandon(self, draft: StoragePath) -> None:
        """Remove ``draft``, which will not be published, if possible."""
        with suppress(Exception):
            forget_listings(self.path)
            self.path.fs.rm((self.path / draft.name).path, recursive=True)

    def replace_by_file(self, write: Callable[[UPath], None]) -> None:
        """Let ``write`` write a file at the checkpoint's URL.

        Raises:
            IsADirectoryError: If it is a directory with other files than a checkpoint's.
        """
        forget_listings(self.path)
        foreign = set(self._children()) - {self._manifest, *self._folders(), *self._plain_files()}
        if foreign:
            what = f"{self.path} is a directory that holds other files than a checkpoint's"
            raise IsADirectoryError(errno.EISDIR, what)
        write(self.path)
        self._remove_manifest()  # from here on readers find the file
        self._remove([*self._folders(), *self._plain_files()])

    def recover(self) -> None:
        """Drop cached listings, since other ranks may have written; a store has nothing to restore."""
        forget_listings(self.path)

    def remove(self) -> None:
        """Remove the checkpoint: first the manifest, then the rest."""
        forget_listings(self.path)
        self._remove_manifest()
        if exists(self.path):
            self.path.fs.rm(self.path.path, recursive=True)
        forget_listings(self.path)

    @property
    def _manifest(self) -> UPath:
        return self.path / MANIFEST_FILE

    def _write(self, text: str) -> None:
        """Write the manifest, atomically."""
        try:
            self.path.fs.pipe_file(self._manifest.path, text.encode())
        except Exception as error:
            if not self._is_written(text):  # it may have arrived, and only the answer may be lost
                raise os_error(f"{self._manifest} could not be written", error) from error

    def _remove_manifest(self) -> None:
        with suppress(FileNotFoundError):
            self.path.fs.rm_file(self._manifest.path)

    def _is_written(self, text: str) -> bool:
        with suppress(Exception):
            forget_listings(self.path)
            return bool(self._manifest.read_text() == text)
        return False

    def _children(self) -> list[UPath]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _folders(self) -> list[UPath]:
        """Folders of saves."""
        return [child for child in self._children() if _FOLDER_OF_A_SAVE.fullmatch(child.name)]

    def _plain_files(self) -> list[UPath]:
        """Files of a checkpoint that was copied here from a file system."""
        return [child for child in self._children() if child.suffix == ".distcp" or child.name in (META_FILE, DCP_FILE)]

    def _remove(self, children: Iterable[UPath]) -> None:
        for child in children:
            self.path.fs.rm(child.path, recursive=True)
