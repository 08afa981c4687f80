"""The location of a checkpoint, on a file system or in a store: what saving and loading call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lightning_mics.checkpoint.storage.folder import CheckpointFolder
from lightning_mics.checkpoint.storage.manifest import Manifest
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.checkpoint.storage.store import CheckpointStore


def checkpoint_location(path: StoragePath) -> CheckpointLocation:
    """The location of the checkpoint at ``path``, on a file system or in a store."""
    return CheckpointFolder(path) if isinstance(path, Path) else CheckpointStore(path)


class CheckpointLocation(Protocol):
    """The location of one checkpoint; one rank calls, the others wait for it."""

    def begin(self) -> StoragePath:
        """Make an empty draft for a new checkpoint."""

    def publish(self, draft: Any, manifest: Manifest) -> None:
        """Make the draft the checkpoint.

        Args:
            draft: Folder from :meth:`begin`, with all files written.
            manifest: List of the files.
        """

    def abandon(self, draft: Any) -> None:
        """Remove a draft that will not be published."""

    def replace_by_file(self, write: Callable[[Any], None]) -> None:
        """Let ``write`` write a file at the checkpoint's path."""

    def recover(self) -> None:
        """Repair the remains of a killed job, before the checkpoint is read."""
