"""Reading pickled values and metadata without running code that they hold."""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from upath import UPath

from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.storage.path import StoragePath, is_local


def load_value(file: Any, *, name: str, weights_only: bool, mapped: bool = False) -> Any:
    """Load a value that ``torch.save`` has written, onto the CPU.

    Args:
        file: Path or stream.
        name: Name of the file in errors.
        weights_only: Whether the value must be plain data and tensors. Otherwise loading may run code.
        mapped: Whether tensors are mapped to memory, so that they are read when they are used.

    Raises:
        UnsafeCheckpointError: If it is something else and ``weights_only``.
        DamagedCheckpointError: If it cannot be read.
    """
    try:
        with _local_file(file) as local:
            return torch.load(local, map_location="cpu", mmap=mapped, weights_only=weights_only)
    except Exception as error:  # bytes that are not a pickle raise every kind of error
        if not weights_only:
            raise
        forbidden = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if forbidden is None:
            raise DamagedCheckpointError(f"{name} cannot be read: {_first_line(error)}") from error
        raise UnsafeCheckpointError(
            f"{name} holds {forbidden[1]}, which is neither plain data nor a tensor, and loading it could run code; if "
            "you trust where the checkpoint comes from, pass weights_only=False, to this call or to the strategy"
        ) from error


def read_metadata(file: StoragePath) -> Metadata:
    """Read the metadata in ``file``; for the errors see :meth:`SafeReader.read_metadata`."""
    try:
        with file.open("rb") as stream:
            metadata: Metadata = _Descriptions(stream).load()
        _check_types(metadata)
        files = {info.relative_path for info in metadata.storage_data.values()}
        elsewhere = sorted(str(name) for name in files if PurePath(name).name != str(name))
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{file} {error}") from None
    except Exception as error:  # bytes that are not a pickle raise every kind of error
        raise DamagedCheckpointError(f"checkpoint {file.parent} is corrupted: {file.name}: {error!r}") from None
    if elsewhere:
        raise UnsafeCheckpointError(f"{file} names files outside of the checkpoint: {elsewhere[:3]}")
    return metadata


def _check_types(metadata: Any) -> None:
    """Check that metadata has the types that torch has written: an unpickler sets attributes to anything.

    Raises:
        TypeError: If something is of another type.
        AttributeError: If something is missing.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise TypeError(f"a {type(metadata).__name__} is not metadata")
    if not isinstance(metadata.planner_data, dict | None):
        raise TypeError("the paths of entries are not a dictionary")
    for name, described in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(described, TensorStorageMetadata | BytesStorageMetadata):
            raise TypeError(f"entry {name!r} is not described as a tensor or value")
        if isinstance(described, TensorStorageMetadata):
            places = [(chunk.offsets, chunk.sizes) for chunk in described.chunks]
            shapes = [described.size, *chain(*places)]
            if not isinstance(described.properties.dtype, torch.dtype) or not all(map(_is_shape, shapes)):
                raise TypeError(f"the description of tensor {name!r} has no dtype, or shapes that are none")
    for index, place in metadata.storage_data.items():
        if not isinstance(index.fqn, str) or not isinstance(place.offset, int) or not isinstance(place.length, int):
            raise TypeError(f"the place of {index!r} is none")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(length, int) and length >= 0 for length in value)


@contextmanager
def plain_errors(path: StoragePath) -> Iterator[None]:
    """Raise a rank's error in reading ``path`` in place of torch's, which is a BaseException with all tracebacks.

    Raises:
        UnsafeCheckpointError: If a shard holds more than tensors.
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


class _Descriptions(pickle.Unpickler):
    """An unpickler that knows the classes that describe tensors and no others."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an enumeration
            return _member
        raise UnsafeCheckpointError(f"names {module}.{name}, which describes no tensor: loading it could run code")


def _member(enumeration: Any, name: Any) -> Any:
    """A member of an enumeration, and nothing else that ``getattr`` would return."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise UnsafeCheckpointError("names builtins.getattr, which describes no tensor: loading it could run code")
    return enumeration[name]


@contextmanager
def _local_file(file: Any) -> Iterator[Any]:
    """The file itself, or a temporary copy if it is in a store: one that can be read in any order."""
    if not isinstance(file, UPath) or is_local(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        file.fs.get_file(file.path, str(copy))
        yield copy


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
