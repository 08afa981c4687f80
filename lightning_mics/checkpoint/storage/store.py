"""Where a checkpoint is stored in an object store, which cannot rename.

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
from pathlib import Path
from typing import Any, Protocol

from upath import UPath

from lightning_mics.checkpoint.errors import DamagedCheckpointError, os_error
from lightning_mics.checkpoint.storage.folder import DCP_FILE, META_FILE, CheckpointFolder
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, exists, forget_listings

_FOLDER_OF_A_SAVE = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class CheckpointStore:
    """The place of one checkpoint in a store; used as
    :class:`~lightning_mics.checkpoint.storage.folder.CheckpointFolder` is.

    A job has at most one save going on at one place.

    Attributes:
        path: Where the checkpoint is seen.
    """

    path: UPath

    def begin(self) -> UPath:
        """Choose the folder that a new checkpoint is written into, and clear away what a killed job has left."""
        forget_listings(self.path)
        with suppress(DamagedCheckpointError):  # its files may be of use to somebody until the new ones are there
            named = Manifest.read(self.path).folder if exists(self._manifest) else None
            self._remove(folder for folder in self._folders() if folder.name != named)
        return self.path / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"

    def publish(self, draft: StoragePath, manifest: Manifest) -> None:
        """Let the files in ``draft``, which ``manifest`` lists, be the checkpoint; foreign files at its place stay."""
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
        """Remove ``draft``, which will not be published, as far as that is possible."""
        with suppress(Exception):
            forget_listings(self.path)
            self.path.fs.rm((self.path / draft.name).path, recursive=True)

    def replace_by_file(self, write: Callable[[UPath], None]) -> None:
        """Let ``write`` put one file in the checkpoint's place.

        Raises:
            IsADirectoryError: If anything else than a checkpoint is there.
        """
        forget_listings(self.path)
        foreign = set(self._children()) - {self._manifest, *self._folders(), *self._plain_files()}
        if foreign:
            what = f"{self.path} is a directory that holds other files than a checkpoint's"
            raise IsADirectoryError(errno.EISDIR, what)
        write(self.path)
        self._remove_manifest()  # from here on the file is what readers find
        self._remove([*self._folders(), *self._plain_files()])

    def put_back(self) -> None:
        """Nothing waits for its successor here; other ranks' files may be new to this one."""
        forget_listings(self.path)

    def remove(self) -> None:
        """Remove the checkpoint: first what makes it one, then the rest."""
        forget_listings(self.path)
        self._remove_manifest()
        if exists(self.path):
            self.path.fs.rm(self.path.path, recursive=True)
        forget_listings(self.path)

    @property
    def _manifest(self) -> UPath:
        return self.path / MANIFEST_FILE

    def _write(self, text: str) -> None:
        """Write the manifest, whole or not at all."""
        try:
            self.path.fs.pipe_file(self._manifest.path, text.encode())
        except Exception as error:
            if not self._is_written(text):  # it may have arrived, and only the answer been lost
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
        """Those of saves."""
        return [child for child in self._children() if _FOLDER_OF_A_SAVE.fullmatch(child.name)]

    def _plain_files(self) -> list[UPath]:
        """Those of a checkpoint that was copied here from a file system."""
        return [child for child in self._children() if child.suffix == ".distcp" or child.name in (META_FILE, DCP_FILE)]

    def _remove(self, children: Iterable[UPath]) -> None:
        for child in children:
            self.path.fs.rm(child.path, recursive=True)


class CheckpointPlace(Protocol):
    """Where one checkpoint lives; one rank calls, the others wait for it."""

    def begin(self) -> StoragePath:
        """Where to write a new checkpoint."""

    def publish(self, draft: Any, manifest: Manifest) -> None:
        """Make what was written there the checkpoint."""

    def abandon(self, draft: Any) -> None:
        """Give up what was written there."""

    def replace_by_file(self, write: Callable[[Any], None]) -> None:
        """Put one file in the checkpoint's place."""

    def put_back(self) -> None:
        """See to what a killed job has left, before the checkpoint is read."""


def checkpoint_place(path: StoragePath) -> CheckpointPlace:
    """The place of the checkpoint at ``path``."""
    return CheckpointFolder(path) if isinstance(path, Path) else CheckpointStore(path)
