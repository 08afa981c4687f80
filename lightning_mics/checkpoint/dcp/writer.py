"""The files that ``torch.distributed.checkpoint`` writes and reads, on a file system or a store.

Each file gets its checksum as it is written, so that nobody has to read it again for that. From a store a rank asks for
the bytes of one tensor after the other, and for no others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter

from lightning_mics.checkpoint.errors import os_error
from lightning_mics.checkpoint.progress import unseen
from lightning_mics.checkpoint.storage.manifest import FileFacts
from lightning_mics.checkpoint.storage.path import StoragePath, has_folders, is_local, size_and_etag, storage_path


class ShardWriter(FileSystemWriter):
    """Writes this rank's shards into a folder.

    Args:
        folder: On storage that all ranks share.
        advance: Is told of bytes as they are written.
    """

    def __init__(self, folder: StoragePath, *, advance: Callable[[int], object] = unseen) -> None:
        super().__init__(str(folder), sync_files=is_local(folder))
        self.fs: Any = ShardFiles(advance=advance)
        self.path: Any = folder

    @property
    def checkpoint_id(self) -> str:
        """Becomes a part of the metadata, which is read as plain data."""
        return str(self.path)

    def write_bytes(self, content: bytes | memoryview, *, name: str) -> None:
        """Write one file more."""
        with self.fs.create_stream(self.path / name, "wb") as stream:
            stream.write(content)

    @property
    def written(self) -> dict[str, FileFacts]:
        """What this rank has written so far, by name."""
        written: dict[str, FileFacts] = self.fs.written
        return written


class ShardFiles(FileSystemBase):
    """What ``torch.distributed.checkpoint`` needs of a file system.

    Attributes:
        written: By name, what was written through it and is complete.
    """

    def __init__(self, *, advance: Callable[[int], object] = unseen) -> None:
        self.written: dict[str, FileFacts] = {}
        self._advance = advance

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """The file at ``path``, opened.

        Raises:
            OSError: With the file's name, if it cannot be written.
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
        except Exception as error:  # drivers have errors of their own, which may not travel to other ranks
            raise os_error(f"{path} could not be written", (stream and stream.failure) or error) from error

    def concat_path(self, path: Any, suffix: str) -> Any:
        """A file in a folder."""
        return path / suffix

    def init_path(self, path: Any) -> Any:
        """A folder."""
        return storage_path(path)

    def rename(self, path: Any, new_path: Any) -> None:
        """Give a file that was written through it another name."""
        path.rename(new_path)
        _, etag = size_and_etag(new_path)
        self.written[new_path.name] = replace(self.written.pop(path.name), etag=etag)

    def mkdir(self, path: Any) -> None:
        """Make a folder, if there are any."""
        if has_folders(path):
            path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)

    def exists(self, path: Any) -> bool:
        """Whether there is a file."""
        found: bool = path.exists()
        return found

    def rm_file(self, path: Any) -> None:
        """Remove a file."""
        path.unlink()


def _opened_to_read(path: Any, mode: str) -> AbstractContextManager[Any]:
    """A driver's own guess of what will be read next would fetch much more than is needed."""
    opened: AbstractContextManager[Any] = path.open(mode) if is_local(path) else path.open(mode, cache_type="none")
    return opened


class HashedStream:
    """A file that is written from its beginning to its end, and its checksum.

    Attributes:
        failure: The error that writing it has met.
    """

    def __init__(self, file: Any, *, advance: Callable[[int], object] = unseen) -> None:
        self._file = file
        self._advance = advance
        self.failure: Exception | None = None
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, content: Any) -> int:
        """Append ``content``."""
        try:
            self._file.write(content)
        except Exception as failure:
            self.failure = failure  # torch.save goes on to fail with an error of its own that says less
            raise
        self._digest.update(content)
        count = memoryview(content).nbytes
        self._size_bytes += count
        self._advance(count)
        return count

    def tell(self) -> int:
        """How much was written."""
        return self._size_bytes

    def fileno(self) -> int:
        """Of the file, if it is on a file system."""
        self._file.flush()
        number: int = self._file.fileno()
        return number

    def flush(self) -> None:
        """Hand on to the file; a store gets its parts when they are large enough."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Complete the file."""
        self._file.close()

    def discard(self) -> None:
        """Leave the file incomplete, which in a store means that it never comes to be."""
        with suppress(Exception):  # it is on its way out because of another error
            if hasattr(self._file, "discard"):
                self._file.discard()
                self._file.closed = True  # or it would try again when it is forgotten
            self._file.close()

    def facts(self, path: StoragePath) -> FileFacts:
        """What was written, as it now is at ``path``.

        Raises:
            OSError: If other than all of it is there.
        """
        size_bytes, etag = size_and_etag(path)
        if size_bytes != self._size_bytes:
            raise OSError(f"{size_bytes} of {self._size_bytes} bytes have arrived")
        return FileFacts(size_bytes=size_bytes, sha256=self._digest.hexdigest(), etag=etag)
