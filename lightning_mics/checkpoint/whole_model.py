"""The model in a sharded checkpoint, whole: read by one process alone, on the CPU, without the job that wrote it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_mics._torch.checkpoint import unflatten_state_dict
from lightning_mics.checkpoint.dcp.load_planner import SafePlanner
from lightning_mics.checkpoint.dcp.reader import SafeReader
from lightning_mics.checkpoint.dcp.unpickling import load_value, plain_errors
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest, refuse_damaged
from lightning_mics.checkpoint.storage.path import StoragePath, exists

_MODEL = "model."


def check_whole(path: StoragePath) -> StoragePath:
    """Compare the files of the checkpoint at ``path`` with its manifest; returns the folder that they are in.

    Raises:
        DamagedCheckpointError: If files are missing, cut short or altered; the message names them.
    """
    if not exists(path / MANIFEST_FILE):
        warnings.warn(f"{path} has no {MANIFEST_FILE}: nobody can say whether it is whole", stacklevel=2)
        return path
    manifest = Manifest.read(path)
    problems = manifest.problems(path)
    refuse_damaged(path, problems)
    return manifest.content(path)


def model_tensors(reader: SafeReader) -> dict[str, TensorStorageMetadata]:
    """The shapes and dtypes of the model's tensors, by name.

    Raises:
        DamagedCheckpointError: If the file that lists them cannot be read.
        UnsafeCheckpointError: If reading it would run code.
    """
    stored = reader.read_metadata().state_dict_metadata
    return {
        name.removeprefix(_MODEL): entry
        for name, entry in stored.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(reader: SafeReader, wanted: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Some of :func:`model_tensors` and no others, whole; for the errors see :func:`read_whole`."""
    tensors: dict[str, Any] = {_MODEL + name: _empty(entry) for name, entry in wanted.items()}
    _read(reader, tensors, weights_only=True)
    return {name: tensors[_MODEL + name] for name in wanted}


def read_whole(path: StoragePath, *, weights_only: bool = True, map_location: Any = None) -> dict[str, Any]:
    """What a full checkpoint file of the same training state would hold, but for the states of optimizers.

    Args:
        path: The directory of a sharded checkpoint.
        weights_only: Whether what is no tensor may be plain data only. Off, it may run code as it loads.
        map_location: Where tensors go to, as in ``torch.load``; they come from the CPU.

    Raises:
        DamagedCheckpointError: If files are missing, cut short, altered, or cannot be read.
        UnsafeCheckpointError: If loading would run code and ``weights_only``.
    """
    content = check_whole(path)
    meta: dict[str, Any] = load_value(content / META_FILE, name=str(path / META_FILE), weights_only=weights_only)
    reader = SafeReader(content)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {
        name: _empty(entry) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_MODEL)
    }
    _read(reader, state, weights_only=weights_only)
    placed = {name: _placed(value, map_location) for name, value in state.items()}
    nested: dict[str, Any] = unflatten_state_dict(placed, metadata.planner_data)
    return {**meta, "state_dict": nested.get("model", {})}


def _read(reader: SafeReader, state: dict[str, Any], *, weights_only: bool) -> None:
    planner = SafePlanner(weights_only=weights_only)
    with plain_errors(reader.path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        load_shards(state, storage_reader=reader, planner=planner, no_dist=True)


def _empty(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _placed(value: Any, map_location: Any) -> Any:
    """A tensor where ``torch.load`` would have put it, in whichever of its four ways that is said."""
    if map_location is None or not isinstance(value, Tensor):
        return value
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)
