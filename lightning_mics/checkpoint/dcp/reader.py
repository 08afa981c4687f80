"""Reading the files of ``torch.distributed.checkpoint`` without running code in them.

The metadata is a pickle, and so is every value that is not a tensor; torch reads both with an unpickler that imports
and calls whatever they name. Here metadata may name only the classes that describe tensors, and values must be plain
data and tensors, unless the caller passes ``weights_only=False``.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lightning_mics._torch.checkpoint import locate_values
from lightning_mics.checkpoint.dcp.unpickling import read_metadata
from lightning_mics.checkpoint.dcp.writer import ShardFiles
from lightning_mics.checkpoint.storage.path import StoragePath, is_local
from lightning_mics.checkpoint.storage.progress import progress_bar

AT_ONCE_BYTES = 2**23  # from a store: about the bytes that a connection carries in the time of a few requests


class SafeReader(FileSystemReader):
    """Reads a checkpoint's directory: its metadata if that is data only, and the requested parts of its tensors.

    Args:
        folder: Folder of the shards.
        show_progress: Whether this process displays a progress bar while it reads.
        describe: Function that returns the metadata, which may have other names than are stored; None reads them.
        checked: Function that wraps an open file, given its name, in one that checks what is read; None checks nothing.
    """

    def __init__(
        self,
        folder: StoragePath,
        *,
        show_progress: bool = False,
        describe: Callable[[], Metadata] | None = None,
        checked: Callable[[Any, str], Any] | None = None,
    ) -> None:
        super().__init__(str(folder))
        self._describe = describe
        self._checked = checked or (lambda stream, _: stream)
        self._show_progress = show_progress
        self.fs: Any = ShardFiles()
        self.path: Any = folder
        self._local = is_local(folder)
        self._metadata: Metadata | None = None

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """The bytes of one value, as a stream; small ones are fetched from a store by one request."""
        if self._local or sinfo.length > AT_ONCE_BYTES:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata, once.

        Raises:
            UnsafeCheckpointError: If it names other classes than those that describe tensors, or files elsewhere.
            DamagedCheckpointError: If it cannot be read.
        """
        if self._metadata is None:  # it is large for a large job, and torch reads it at each load
            file: Any = self._get_metadata_path(kwargs.get("rank"))
            self._metadata = self._describe() if self._describe is not None else read_metadata(file)
        metadata = self._metadata
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepare to read data.

        Args:
            metadata: Metadata of the checkpoint.
            is_coordinator: Whether this rank coordinates.
            args: Further arguments of newer versions of torch.
            kwargs: Further arguments of newer versions of torch.
        """
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._described = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan. torch's own method reads all of a stored tensor where a part is requested.

        Args:
            plan: Items to read.
            planner: Planner that provides the tensors to read into.
        """
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        with progress_bar(
            f"loading {self.path.name}", total_bytes=sum(map(self._bytes_of, plan.items)), enabled=self._show_progress
        ) as advance:
            for name, items in by_file.items():
                with self._opened(name) as file:
                    for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                        self._read_item(item, self._slice_file(file, self.storage_data[item.storage_index]), planner)
                        advance(self._bytes_of(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
            file = self._checked(stream, name)
            try:
                yield file
            except Exception as error:  # torch.load has errors of its own, which say less
                raise getattr(file, "failure", None) or error from None

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
        if self._is_complete(item):
            target.copy_(torch.load(stored, map_location="cpu", weights_only=True))
        else:
            target.copy_(_read_part(stored, offsets=item.storage_offsets, lengths=item.lengths))
        planner.commit_tensor(item, target)

    def _is_complete(self, item: ReadItem) -> bool:
        """Whether all of a stored tensor is requested."""
        described = self._described[item.storage_index.fqn]
        number = item.storage_index.index
        assert isinstance(described, TensorStorageMetadata) and number is not None
        return described.chunks[number].sizes == item.lengths


def _read_part(stored: IO[bytes], *, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    """Read a part of a tensor that ``torch.save`` has written to ``stored``, and no other bytes if it is full rows."""
    described, first_byte = locate_values(stored)
    if not described.is_contiguous() or described.shape[1:] != lengths[1:]:
        stored.seek(0)
        tensor: torch.Tensor = torch.load(stored, map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(tensor, offsets, lengths)
    values = torch.empty(lengths, dtype=described.dtype)
    stored.seek(first_byte + offsets[0] * described[0].nbytes)
    count = stored.readinto(values.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
    if count != values.nbytes:
        raise EOFError(f"{count} of {values.nbytes} bytes are there")
    return values
