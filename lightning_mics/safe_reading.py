"""Reading the files of ``torch.distributed.checkpoint`` without running what may be in them.

Its metadata is a pickle, and so is every value that is not a tensor; both are read by torch with an unpickler that
imports and calls whatever they name. Here metadata may name the classes that describe tensors and nothing else, and
values are plain data and tensors, unless the caller trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from lightning_mics.manifest import DamagedCheckpointError

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


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint holds more than data: loading it would run code."""


class SafeReader(FileSystemReader):
    """Reads a checkpoint's directory; its metadata is data or is refused."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata.

        Raises:
            UnsafeCheckpointError: If it names anything but the classes that describe tensors, or files elsewhere.
            DamagedCheckpointError: If it cannot be read.
        """
        file = Path(self._get_metadata_path(kwargs.get("rank")))
        metadata = read_metadata(file)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Loads what the state asks for and the checkpoint has; what it lacks keeps its value.

    Args:
        weights_only: Whether values that are no tensors may be plain data only.
    """

    def __init__(self, *, weights_only: bool) -> None:
        super().__init__(allow_partial_load=True)
        self._weights_only = weights_only

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into its place.

        Raises:
            UnsafeCheckpointError: If it is more than plain data and that was asked for.
        """
        if self._weights_only:
            load_value(value, name=read_item.dest_index.fqn, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)


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
        return torch.load(file, map_location="cpu", mmap=mapped, weights_only=weights_only)
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def read_metadata(file: Path) -> Metadata:
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
