"""The unsharded model in a sharded checkpoint: read by one process alone, on the CPU, without the job that wrote it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_mics._torch.checkpoint import unflatten_state_dict
from lightning_mics.checkpoint.content.entries import LoadedEntries
from lightning_mics.checkpoint.keys import MODEL_KEY
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_checkpoint
from lightning_mics.checkpoint.storage.path import StoragePath

_OF_MODEL = f"{MODEL_KEY}."


def model_tensors(checkpoint: OpenCheckpoint) -> dict[str, TensorStorageMetadata]:
    """The shapes and dtypes of the model's tensors, by FQN.

    Raises:
        DamagedCheckpointError: If the file that lists them cannot be read.
        UnsafeCheckpointError: If reading it would run code.
    """
    stored = checkpoint.reader.read_metadata().state_dict_metadata
    return {
        name.removeprefix(_OF_MODEL): entry
        for name, entry in stored.items()
        if name.startswith(_OF_MODEL) and isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(checkpoint: OpenCheckpoint, wanted: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Read some of the model's tensors, unsharded, and no others.

    Args:
        checkpoint: The checkpoint, whose files have been checked.
        wanted: Some entries of :func:`model_tensors`.

    Returns:
        The tensors on the CPU, by FQN.

    Raises:
        DamagedCheckpointError: If files cannot be read.
    """
    tensors: dict[str, Any] = {_OF_MODEL + name: _empty(entry) for name, entry in wanted.items()}
    checkpoint.read_into(tensors, weights_only=True, alone=True)
    return {name: tensors[_OF_MODEL + name] for name in wanted}


def read_whole(path: StoragePath, *, weights_only: bool = True, map_location: Any = None) -> dict[str, Any]:
    """Read the contents of a full checkpoint file of the same training state, without the states of optimizers.

    Args:
        path: Directory of a sharded checkpoint.
        weights_only: Whether entries other than tensors must be plain data. Otherwise loading may run code.
        map_location: Destination of tensors, as in ``torch.load``; they come from the CPU.

    Raises:
        DamagedCheckpointError: If files are missing, cut short, altered, or cannot be read.
        UnsafeCheckpointError: If loading would run code and ``weights_only``.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    inside = LoadedEntries(None)
    with inside.unpickled():
        meta = checkpoint.meta(weights_only=weights_only)
    layout, metadata = checkpoint.layout_in(meta), checkpoint.reader.read_metadata()
    if inside.tensors():
        checkpoint.read_into(inside.tensors(), weights_only=True, alone=True)
    state: dict[str, Any] = {
        name: _empty(entry) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_OF_MODEL)
    }
    checkpoint.read_into(state, weights_only=weights_only, alone=True)
    placed = {name: _placed(value, map_location) for name, value in state.items()}
    nested: dict[str, Any] = unflatten_state_dict(placed, metadata.planner_data)
    model = nested.get(MODEL_KEY, {})
    if layout is not None:
        restore = layout.record.containers.restore
        model = {name: restore(value, _OF_MODEL + name) for name, value in model.items()}
    return {**meta, "state_dict": model}


def _empty(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _placed(value: Any, map_location: Any) -> Any:
    """A tensor moved as by ``torch.load``, which takes four kinds of ``map_location``; any other value as it is."""
    if map_location is None or not isinstance(value, Tensor):
        return value
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)
