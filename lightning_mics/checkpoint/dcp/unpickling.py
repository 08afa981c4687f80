"""Reading pickled values and metadata without running code that they hold."""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from upath import UPath

from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.storage.path import StoragePath, is_local

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
            "you trust where the checkpoint comes from, pass weights_only=False, to this call or to the strategy"
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
