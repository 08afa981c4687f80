"""The files that ``torch.distributed.checkpoint`` writes and reads, on a file system or a store.

A file's checksums are computed while it is written, so that it is not read again for that. A rank fetches from a store
the bytes of one tensor after the other, and no others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from lightning_mics.checkpoint.dcp.second_names import add_second_names
from lightning_mics.checkpoint.errors import os_error
from lightning_mics.checkpoint.storage.blocks import BlockChecksums
from lightning_mics.checkpoint.storage.manifest import FileFacts
from lightning_mics.checkpoint.storage.path import StoragePath, has_folders, is_local, size_and_etag, storage_path
from lightning_mics.checkpoint.storage.progress import no_progress


class ShardWriter(FileSystemWriter):
    """Writes this rank's shards into a folder.

    Args:
        folder: Folder on storage that all ranks share.
        advance: Function to call with the number of bytes of each write.
        second_keys: Keys under which other programs find entries, with this package's keys of these.
        from_host: Whether all tensors are in host memory. torch would otherwise copy on the current CUDA stream, which
            in a thread of its own is one of the first GPU.
    """

    def __init__(
        self,
        folder: StoragePath,
        *,
        advance: Callable[[int], object] = no_progress,
        second_keys: Mapping[str, str] | None = None,
        from_host: bool = False,
    ) -> None:
        super().__init__(str(folder), sync_files=is_local(folder))
        if from_host:
            self.per_thread_copy_ahead = 0
        self._second_keys = second_keys or {}
        self.fs: Any = ShardFiles(advance=advance)
        self.path: Any = folder

    @property
    def checkpoint_id(self) -> str:
        """The folder as a string: it becomes a part of the metadata, which must be plain data."""
        return str(self.path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata.

        Args:
            metadata: Metadata of the checkpoint.
            results: Places of what each rank has written.
        """
        add_second_names(metadata, results, self._second_keys)
        super().finish(metadata, results)

    def write_bytes(self, content: bytes | memoryview, *, name: str) -> None:
        """Write one more file.

        Args:
            content: Bytes of the file.
            name: Name of the file in the folder.
        """
        with self.fs.create_stream(self.path / name, "wb") as stream:
            stream.write(content)

    @property
    def written(self) -> dict[str, FileFacts]:
        """The facts of all files that this rank has written so far, by name."""
        written: dict[str, FileFacts] = self.fs.written
        return written


class ShardFiles(FileSystemBase):
    """The operations of a file system that ``torch.distributed.checkpoint`` needs.

    Args:
        advance: Function to call with the number of bytes of each write.

    Attributes:
        written: Facts of the complete files that were written through it, by name.
    """

    def __init__(self, *, advance: Callable[[int], object] = no_progress) -> None:
        self.written: dict[str, FileFacts] = {}
        self._advance = advance

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file.

        Args:
            path: Path or URL of the file.
            mode: "rb" to read, "wb" to write.

        Raises:
            OSError: If it cannot be written, with the file's name.
        """
        with _opened_to_read(path, mode) if "r" in mode else self._recorded(path, mode) as stream:
            yield stream

    @contextmanager
    def _recorded(self, path: StoragePath, mode: str) -> Iterator[HashedStream]:
        stream = None
        try:
            stream = HashedStream(path.open(mode), advance=self._advance)
            try:
                yield stream
                stream.close()
            except BaseException:
                stream.discard()
                raise
            self.written[path.name] = stream.facts(path)
        except Exception as error:  # drivers have errors of their own, which may not pickle for other ranks
            raise os_error(f"{path} could not be written", (stream and stream.failure) or error) from error

    def concat_path(self, path: Any, suffix: str) -> Any:
        """The path of a file in a folder.

        Args:
            path: Path or URL of the folder.
            suffix: Name of the file.
        """
        return path / suffix

    def init_path(self, path: Any) -> Any:
        """The folder that ``path`` names."""
        return storage_path(path)

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file that was written through this object.

        Args:
            path: Path or URL of the file.
            new_path: New path or URL.
        """
        path.rename(new_path)
        _, etag = size_and_etag(new_path)
        self.written[new_path.name] = replace(self.written.pop(path.name), etag=etag)

    def mkdir(self, path: Any) -> None:
        """Make a folder, on storage that has folders."""
        if has_folders(path):
            path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether ``checkpoint_id`` is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)

    def exists(self, path: Any) -> bool:
        """Whether the file exists."""
        found: bool = path.exists()
        return found

    def rm_file(self, path: Any) -> None:
        """Remove a file."""
        path.unlink()


class HashedStream:
    """A file that is written from its beginning to its end, and its checksums.

    Args:
        file: Stream to write to.
        advance: Function to call with the number of bytes of each write.

    Attributes:
        failure: Error of a write, or None.
    """

    def __init__(self, file: Any, *, advance: Callable[[int], object] = no_progress) -> None:
        self._file = file
        self._advance = advance
        self.failure: Exception | None = None
        self._digest = hashlib.sha256()
        self._blocks = BlockChecksums()
        self._size_bytes = 0

    def write(self, content: Any) -> int:
        """Append ``content``; returns its bytes."""
        try:
            self._file.write(content)
        except Exception as failure:
            self.failure = failure  # torch.save then raises an error of its own that says less
            raise
        self._digest.update(content)
        self._blocks.update(content)
        count = memoryview(content).nbytes
        self._size_bytes += count
        self._advance(count)
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size_bytes

    def fileno(self) -> int:
        """The file descriptor, on a file system."""
        self._file.flush()
        number: int = self._file.fileno()
        return number

    def flush(self) -> None:
        """Flush the file; parts are sent to a store when they are large enough."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Complete the file."""
        self._file.close()

    def discard(self) -> None:
        """Leave the file incomplete; in a store it will not exist."""
        with suppress(Exception):  # another error is being raised
            if hasattr(self._file, "discard"):
                self._file.discard()
                self._file.closed = True  # otherwise it tries again when it is deleted
            self._file.close()

    def facts(self, path: StoragePath) -> FileFacts:
        """The facts of the written file, which is at ``path``.

        Raises:
            OSError: If its size there is another than was written.
        """
        size_bytes, etag = size_and_etag(path)
        if size_bytes != self._size_bytes:
            raise OSError(f"{size_bytes} of {self._size_bytes} bytes have arrived")
        return FileFacts(size_bytes=size_bytes, sha256=self._digest.hexdigest(), blocks=self._blocks.text(), etag=etag)


def _opened_to_read(path: Any, mode: str) -> AbstractContextManager[Any]:
    """The file, opened without the read-ahead of drivers, which fetches much more than is needed."""
    opened: AbstractContextManager[Any] = path.open(mode) if is_local(path) else path.open(mode, cache_type="none")
    return opened
