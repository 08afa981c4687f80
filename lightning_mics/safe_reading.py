"""Reading the files of ``torch.distributed.checkpoint`` without running what may be in them.

Its metadata is a pickle, and so is every value that is not a tensor; both are read by torch with an unpickler that
imports and calls whatever they name. Here metadata may name the classes that describe tensors and nothing else, and
values are plain data and tensors, unless the caller trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.futures import Future
from upath import UPath

from lightning_mics._torch_compat import locate_values
from lightning_mics.manifest import DamagedCheckpointError
from lightning_mics.own_rows import divide
from lightning_mics.progress import progress_bar
from lightning_mics.shard_files import ShardFiles
from lightning_mics.storage_path import StoragePath, is_local

_DESCRIPTIONS = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
}


AT_ONCE_BYTES = 2**23  # of a store: about what a connection carries in the time of a few requests


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint holds more than data: loading it would run code."""


class SafeReader(FileSystemReader):
    """Reads a checkpoint's directory; its metadata is data or is refused. Of tensors it reads what is wanted.

    Args:
        folder: Where the shards are.
        show_progress: Whether to show a progress bar where reading takes long.
    """

    def __init__(self, folder: StoragePath, *, show_progress: bool = False) -> None:
        super().__init__(str(folder))
        self._show_progress = show_progress
        self.fs: Any = ShardFiles()
        self.path: Any = folder
        self._local = is_local(folder)
        self._metadata: Metadata | None = None

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """The bytes of one value; from a store a small one at once, since each request takes long."""
        if self._local or sinfo.length > AT_ONCE_BYTES:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata.

        Raises:
            UnsafeCheckpointError: If it names anything but the classes that describe tensors, or files elsewhere.
            DamagedCheckpointError: If it cannot be read.
        """
        if self._metadata is None:  # of a large job it is large, and torch asks for it at each load
            file: Any = self._get_metadata_path(kwargs.get("rank"))
            self._metadata = read_metadata(file)
        metadata = self._metadata
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the metadata."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._described = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` lists; torch's own reads a stored tensor whole where a part of it is wanted."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        with progress_bar(
            f"loading {self.path.name}", total_bytes=sum(map(self._bytes_of, plan.items)), shown=self._show_progress
        ) as advance:
            for name, items in by_file.items():
                with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as file:
                    for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                        self._read_item(item, self._slice_file(file, self.storage_data[item.storage_index]), planner)
                        advance(self._bytes_of(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _bytes_of(self, item: ReadItem) -> int:
        described = self._described[item.storage_index.fqn]
        if isinstance(described, TensorStorageMetadata):
            return item.lengths.numel() * described.properties.dtype.itemsize
        return 0

    def _read_item(self, item: ReadItem, stored: IO[bytes], planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(stored.read()))
            return
        target = planner.resolve_tensor(item).detach()
        if self._is_whole(item):
            target.copy_(torch.load(stored, map_location="cpu", weights_only=True))
        else:
            target.copy_(_read_part(stored, offsets=item.storage_offsets, lengths=item.lengths))
        planner.commit_tensor(item, target)

    def _is_whole(self, item: ReadItem) -> bool:
        """Whether all of a stored tensor is wanted."""
        described = self._described[item.storage_index.fqn]
        number = item.storage_index.index
        assert isinstance(described, TensorStorageMetadata) and number is not None
        return described.chunks[number].sizes == item.lengths


def _read_part(stored: IO[bytes], *, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    """A part of a tensor that ``torch.save`` has written to ``stored``; whole rows of it are read alone."""
    whole, first_byte = locate_values(stored)
    if not whole.is_contiguous() or whole.shape[1:] != lengths[1:]:
        stored.seek(0)
        tensor: torch.Tensor = torch.load(stored, map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(tensor, offsets, lengths)
    values = torch.empty(lengths, dtype=whole.dtype)
    stored.seek(first_byte + offsets[0] * whole[0].nbytes)
    count = stored.readinto(values.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
    if count != values.nbytes:
        raise EOFError(f"{count} of {values.nbytes} bytes are there")
    return values


class SafePlanner(DefaultLoadPlanner):
    """Loads what the state asks for and the checkpoint has; what it lacks keeps its value.

    Of sharded tensors each rank asks for its own rows only; :meth:`exchange` brings the rest.

    Args:
        weights_only: Whether values that are no tensors may be plain data only.
    """

    def __init__(self, *, weights_only: bool) -> None:
        super().__init__(allow_partial_load=True)
        self._weights_only = weights_only

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state to load into."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        sharded = {name: value for name, value in self.state_dict.items() if isinstance(value, DTensor)}
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in sharded}
        self._shards = divide({name: sharded[name] for name in sharded.keys() & metadata.state_dict_metadata.keys()})
        self._rows = {
            MetadataIndex(name, rows.offsets): rows for name, shard in self._shards.items() for rows in shard.own()
        }

    def create_local_plan(self) -> LoadPlan:
        """This rank's rows of what is sharded, and all of what is not."""
        assert self.metadata is not None
        plan = create_default_local_load_plan(self.state_dict, self.metadata, strict=False)
        for name, shard in self._shards.items():
            chunks = [rows.chunk for rows in shard.own()]
            plan.items.extend(
                create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], chunks)  # type: ignore[arg-type]
            )
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Where to read to."""
        own = self._rows.get(index)
        return super().lookup_tensor(index) if own is None else own.values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into its place.

        Raises:
            UnsafeCheckpointError: If it is more than plain data and that was asked for.
        """
        if self._weights_only:
            load_value(value, name=read_item.dest_index.fqn, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)

    def exchange(self) -> None:
        """After reading: get from the other replicas what they have read; every rank calls it."""
        for shard in self._shards.values():
            shard.exchange()


@contextmanager
def plain_errors(path: StoragePath) -> Iterator[None]:
    """Raise what went wrong on a rank while reading ``path``: torch's own error is no Exception, and as long as all
    tracebacks.

    Raises:
        UnsafeCheckpointError: If a shard holds more than was to be read from it.
        DamagedCheckpointError: If reading failed.
    """
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        if isinstance(error, UnsafeCheckpointError | DamagedCheckpointError):
            raise error from None
        if isinstance(error, pickle.UnpicklingError):
            raise UnsafeCheckpointError(f"the shards in {path} hold more than tensors: {error}") from None
        raise DamagedCheckpointError(f"reading checkpoint {path} failed on rank {rank}: {error!r}") from failed


def load_value(file: Any, *, name: str, weights_only: bool, mapped: bool = False) -> Any:
    """What ``torch.save`` has written to ``file``.

    Args:
        file: A path or a stream.
        name: What to call it in errors.
        weights_only: Whether it may be plain data and tensors only.
        mapped: Whether tensors stay in the file until they are used.

    Raises:
        UnsafeCheckpointError: If it is more and ``weights_only``.
        DamagedCheckpointError: If it cannot be read.
    """
    try:
        with _local_file(file) as local:
            return torch.load(local, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except Exception as error:  # bytes that are no pickle meet every kind of error
        if not weights_only:
            raise
        forbidden = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if forbidden is None:
            raise DamagedCheckpointError(f"{name} cannot be read: {_first_line(error)}") from error
        raise UnsafeCheckpointError(
            f"{name} holds {forbidden[1]}, which is neither plain data nor a tensor, and loading it could run code; if "
            "you trust where the checkpoint comes from, pass weights_only=False, or trust_checkpoints=True to "
            "MiCSStrategy"
        ) from error


@contextmanager
def _local_file(file: Any) -> Iterator[Any]:
    """What can be read in any order: a copy, if it is in a store."""
    if not isinstance(file, UPath) or is_local(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        file.fs.get_file(file.path, str(copy))
        yield copy


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def read_metadata(file: StoragePath) -> Metadata:
    """The metadata in ``file``; for the errors see :meth:`SafeReader.read_metadata`."""
    try:
        with file.open("rb") as stream:
            metadata = _Descriptions(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError(f"a {type(metadata).__name__} is no metadata")
        files = {info.relative_path for info in metadata.storage_data.values()}
        elsewhere = sorted(str(name) for name in files if PurePath(name).name != str(name))
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{file} {error}") from None
    except Exception as error:  # an unpickler meets every kind of error in bytes that are no pickle
        raise DamagedCheckpointError(f"checkpoint {file.parent} is damaged: {file.name}: {error!r}") from None
    if elsewhere:
        raise UnsafeCheckpointError(f"{file} names files outside of the checkpoint: {elsewhere[:3]}")
    return metadata


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeCheckpointError(f"names {module}.{name}, which describes no tensor: loading it could run code")
