"""A sharded checkpoint, opened: its manifest, its entries and its tensors, for all who load, export or inspect one."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.checkpoint.content.containers import nested
from lightning_mics.checkpoint.content.entries import LoadedEntries
from lightning_mics.checkpoint.content.layout import FullNames, Layout
from lightning_mics.checkpoint.content.opened import OpenedCheckpoint
from lightning_mics.checkpoint.content.stored_tensor import StoredTensor, StoredValue
from lightning_mics.checkpoint.dcp.load_planner import SafePlanner
from lightning_mics.checkpoint.dcp.reader import SafeReader
from lightning_mics.checkpoint.dcp.unpickling import load_value, plain_errors
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.foreign.folders import described, problems_of_sizes
from lightning_mics.checkpoint.foreign.states import entries_of, settled_states
from lightning_mics.checkpoint.foreign.translation import OTHER, Translated
from lightning_mics.checkpoint.keys import MODEL_KEY
from lightning_mics.checkpoint.storage.blocks import CheckedFile
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest, raise_if_corrupted
from lightning_mics.checkpoint.storage.path import StoragePath, exists
from lightning_mics.checkpoint.storage.progress import progress_bar
from lightning_mics.collectives.agreement import on_all_ranks, on_rank_0
from lightning_mics.collectives.control_plane import control_plane


@dataclass(frozen=True)
class OpenCheckpoint:
    """A sharded checkpoint and its manifest; nothing else has been read or checked yet.

    Attributes:
        path: Directory of the checkpoint.
        manifest: List of its files; None if it has none.
        show_progress: Whether this process displays progress bars for long operations.
        wanted: Keys of the model and the optimizers in the state to load into, if it has any.
    """

    path: StoragePath
    manifest: Manifest | None
    show_progress: bool = False
    wanted: FullNames | None = None

    @property
    def content(self) -> StoragePath:
        """Folder that holds the files: the checkpoint's directory, or a folder in it that the manifest names."""
        return self.path if self.manifest is None else self.manifest.content(self.path)

    def problems(self, names: Iterable[str] | None = None) -> list[str]:
        """Compare files with the manifest, by this process alone.

        Args:
            names: Names of the files; None for all.

        Returns:
            A few words for each file that is missing, cut short or altered.
        """
        return [] if self.manifest is None else self.manifest.problems(self.path, names)

    def check(self) -> None:
        """Compare files with the manifest before they are loaded, by this process alone; without a manifest, warn.

        Files of tensors are measured; their bytes are checked as they are read.

        Raises:
            DamagedCheckpointError: If files are missing, cut short or altered; the message names them.
        """
        if self.manifest is None:
            self._warn_of_no_manifest()
            raise_if_corrupted(self.path, problems_of_sizes(self.content, self.described.metadata))
        else:
            raise_if_corrupted(self.path, self.manifest.problems(self.path, before_loading=True))

    def check_on_all_ranks(self) -> None:
        """The same, with each file looked at by one of the ranks; every rank calls it, and every rank raises."""
        manifest = self.manifest
        if manifest is None:
            if dist.get_rank() == 0:
                self._warn_of_no_manifest()
            on_all_ranks(self._describe)
            problems = on_rank_0(lambda: problems_of_sizes(self.content, self.described.metadata))
            raise_if_corrupted(self.path, problems)
            return
        names = sorted(manifest.files)
        own = [name for number, name in enumerate(names) if _checking_rank(name, number) == dist.get_rank()]
        own_bytes = sum(manifest.files[name].size_bytes for name in own if not manifest.is_checked_as_read(name))
        with progress_bar(f"checking {self.path.name}", total_bytes=own_bytes, enabled=self.show_progress) as advance:
            found = on_all_ranks(lambda: manifest.problems(self.path, own, before_loading=True, advance=advance))
        raise_if_corrupted(self.path, sorted(chain(*found)))

    def meta(self, *, weights_only: bool) -> dict[str, Any]:
        """Read the entries that are neither the model's nor an optimizer's.

        Args:
            weights_only: Whether only plain data and tensors are allowed. Otherwise loading may run code.

        Raises:
            UnsafeCheckpointError: If there is something else and ``weights_only``.
            DamagedCheckpointError: If the file cannot be read.
        """
        file = self.content / META_FILE
        if self.manifest is None and not exists(file):
            return {}  # nothing but shards
        meta: dict[str, Any] = load_value(file, name=str(file), weights_only=weights_only)
        return meta

    def layout_in(self, meta: dict[str, Any]) -> Layout | None:
        """The layout in the entries, removed from them; None if they have none.

        Args:
            meta: Entries from :meth:`meta`.

        Raises:
            DamagedCheckpointError: If it is not what was written.
        """
        try:
            return Layout.taken_from(meta)
        except ValueError as error:
            raise DamagedCheckpointError(f"checkpoint {self.path} is corrupted: {META_FILE}: {error}") from None

    @cached_property
    def described(self) -> Translated:
        """The metadata, with this package's names if another program has written it."""
        return described(self.content, own=self.manifest is not None, wanted=self.wanted)

    @cached_property
    def reader(self) -> SafeReader:
        """Reader of the tensors and their metadata."""
        return SafeReader(
            self.content,
            show_progress=self.show_progress,
            describe=lambda: self.described.metadata,
            checked=self._checked,
        )

    def read_into(self, state: dict[str, Any], *, weights_only: bool, alone: bool = False) -> None:
        """Fill ``state`` from the checkpoint, in place; entries that the checkpoint lacks keep their values.

        Args:
            state: Nested dicts with the checkpoint's names; of a sharded tensor (DTensor) this rank's shard is read.
            weights_only: Whether entries other than tensors must be plain data. Otherwise loading may run code.
            alone: Whether one process reads, without others. Otherwise every rank calls it.

        Raises:
            UnsafeCheckpointError: If an entry is not plain data and ``weights_only``.
            DamagedCheckpointError: If files cannot be read.
        """
        planner = SafePlanner(weights_only=weights_only)
        with plain_errors(self.content), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # the request of no_dist
            group = None if alone else control_plane().group
            load_shards(state, storage_reader=self.reader, planner=planner, no_dist=alone, process_group=group)
        planner.exchange()

    def _checked(self, stream: Any, name: str) -> Any:
        """A file that checks what is read from it, if there are checksums of its blocks."""
        facts = self.manifest.files.get(name) if self.manifest is not None else None
        if facts is None or facts.blocks is None:
            return stream
        return CheckedFile(stream, checkpoint=self.path, name=name, size_bytes=facts.size_bytes, checksums=facts.blocks)

    def _describe(self) -> None:
        _ = self.described  # cached

    def _warn_of_no_manifest(self) -> None:
        warnings.warn(f"{self.path} has no {MANIFEST_FILE}: it cannot be checked whether it is complete", stacklevel=3)


def open_checkpoint(path: StoragePath) -> OpenCheckpoint:
    """Open the sharded checkpoint in the directory ``path``, by this process alone.

    Raises:
        DamagedCheckpointError: If its manifest cannot be read.
    """
    return OpenCheckpoint(path, _manifest(path))


def open_on_all_ranks(
    path: StoragePath, *, show_progress: bool = False, wanted: FullNames | None = None
) -> OpenCheckpoint:
    """The same on every rank, by one read of the manifest; every rank calls it.

    Args:
        path: Directory of a sharded checkpoint.
        show_progress: Whether this rank displays progress bars for long operations.
        wanted: Keys of the model and the optimizers in the state to load into, if it has any.
    """
    return OpenCheckpoint(path, on_rank_0(lambda: _manifest(path)), show_progress, wanted)


def _manifest(path: StoragePath) -> Manifest | None:
    return Manifest.read(path) if exists(path / MANIFEST_FILE) else None


def _checking_rank(name: str, number: int) -> int:
    """The rank that reads a file for its checksum: the rank of the same number as its writer, if there is one, since it
    will load most of the file.
    """
    writer = re.match(r"__(\d+)_", name)
    return (int(writer[1]) if writer else number) % dist.get_world_size()


def open_sharded(checkpoint: OpenCheckpoint, *, mesh: Callable[[], DeviceMesh], weights_only: bool) -> OpenedCheckpoint:
    """Read the entries of a sharded checkpoint that is open; every rank calls it.

    Args:
        checkpoint: The checkpoint, whose files were checked.
        mesh: Function that returns the mesh of the job; called if an entry is sharded.
        weights_only: Whether entries other than tensors must be plain data.
    """
    inside = LoadedEntries(mesh)
    with inside.unpickled():
        meta = checkpoint.meta(weights_only=weights_only)
    layout = checkpoint.layout_in(meta)
    metadata = checkpoint.reader.read_metadata()

    def read(targets: Mapping[str, Tensor | None]) -> Mapping[str, Any]:
        filled = dict(targets)
        if filled:
            checkpoint.read_into(filled, weights_only=weights_only)
        return filled

    def fetch(name: str) -> Tensor:
        described = metadata.state_dict_metadata[name]
        assert isinstance(described, TensorStorageMetadata)
        found = {name: torch.empty(described.size, dtype=described.properties.dtype)}
        checkpoint.read_into(found, weights_only=True, alone=True)
        return found[name]

    trees: dict[str, dict[tuple[Any, ...], Any]] = defaultdict(dict)
    paths = metadata.planner_data or {}
    for name, entry in metadata.state_dict_metadata.items():
        path = tuple(paths.get(name, name.split(".", 1)))
        trees[str(path[0])][path[1:]] = _stored(name, entry, fetch)
    read(inside.tensors())
    meta.update(entries_of(trees.pop(OTHER, {}), read))
    described = checkpoint.described
    optimizers = sorted((key for key in trees if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    return OpenedCheckpoint(
        model=nested(trees.get(MODEL_KEY, {})) if trees.get(MODEL_KEY) else {},
        optimizers=[
            _with_groups(settled_states(nested(trees[key]), described.groups.get(key, []), read), checkpoint.path, key)
            for key in optimizers
        ],
        entries=meta,
        rank_states={key: nested(tree) for key, tree in trees.items() if key.startswith("rank_")},
        names=layout.names if layout else described.names,
        record=layout.record if layout else None,
        read=read,
    )


def _with_groups(state: dict[str, Any], path: StoragePath, key: str) -> dict[str, Any]:
    """The state of an optimizer, whose groups are dictionaries.

    Raises:
        DamagedCheckpointError: If they are not.
    """
    groups = state.get("param_groups", [])
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise DamagedCheckpointError(f"checkpoint {path} is corrupted: the parameter groups of {key} are no groups")
    return state


def _stored(name: str, entry: Any, fetch: Callable[[str], Tensor]) -> StoredTensor | StoredValue:
    if not isinstance(entry, TensorStorageMetadata):
        return StoredValue(name)
    first = next((chunk for chunk in entry.chunks if any(chunk.offsets)), None)
    split = None if first is None else next(dim for dim, offset in enumerate(first.offsets) if offset)
    return StoredTensor(name, size=entry.size, dtype=entry.properties.dtype, fetch=fetch, split_dim=split)
