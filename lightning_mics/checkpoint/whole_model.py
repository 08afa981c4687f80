"""The unsharded model in a sharded checkpoint: read by one process alone, on the CPU, without the job that wrote it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_mics._torch.checkpoint import unflatten_state_dict
from lightning_mics.checkpoint.content.entries import LoadedEntries
from lightning_mics.checkpoint.keys import MODEL_KEY
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_checkpoint
from lightning_mics.checkpoint.storage.path import StoragePath

CURRENT_MODEL_KEY = "current_model_state"  # Lightning's: what is trained, where the model is an average of it

_OF_MODEL = f"{MODEL_KEY}."


@dataclass(frozen=True)
class StoredModel:
    """The tensors of one model in a checkpoint; their values are read later.

    Attributes:
        names: Their names in the shards, by FQN.
        shapes: Their shapes and dtypes, on the meta device, by FQN: each [any].
        values: Those that are not in the shards, with their values, by FQN: each [any].
    """

    names: dict[str, str]
    shapes: dict[str, Tensor]
    values: dict[str, Tensor]


def stored_model(checkpoint: OpenCheckpoint) -> StoredModel:
    """The model's tensors.

    Raises:
        DamagedCheckpointError: If the file that lists them cannot be read.
        UnsafeCheckpointError: If reading it would run code.
    """
    stored = checkpoint.reader.read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix(_OF_MODEL): _empty(entry, device="meta")
        for name, entry in stored.items()
        if name.startswith(_OF_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    return StoredModel({name: _OF_MODEL + name for name in shapes}, shapes, {})


def stored_current_model(checkpoint: OpenCheckpoint) -> StoredModel:
    """The weights that were trained, where the model in the checkpoint is an average of them.

    Raises:
        ValueError: If it holds no average.
        DamagedCheckpointError: If its entries cannot be read.
        UnsafeCheckpointError: If reading them would run code.
    """
    inside = LoadedEntries(None)
    with inside.unpickled(), torch.device("meta"):
        state = checkpoint.meta(weights_only=True).get(CURRENT_MODEL_KEY)
    if not isinstance(state, dict):
        raise ValueError(
            f"{checkpoint.path} holds no average of weights: it was saved without a callback such as "
            "EMAWeightAveraging, so that its model is what was trained"
        )
    names = {name: stored for name, value in state.items() if (stored := inside.name_of(value)) is not None}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return StoredModel(names, tensors, {name: value for name, value in tensors.items() if name not in names})


def read_tensors(checkpoint: OpenCheckpoint, model: StoredModel, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of a model, unsharded, and no others.

    Args:
        checkpoint: The checkpoint, whose files have been checked.
        model: The model's tensors.
        wanted: FQNs of some of them.

    Returns:
        The tensors on the CPU, by FQN.

    Raises:
        DamagedCheckpointError: If files cannot be read.
    """
    read = {name: torch.empty_like(model.shapes[name], device="cpu") for name in wanted if name in model.names}
    tensors: dict[str, Any] = {model.names[name]: tensor for name, tensor in read.items()}
    checkpoint.read_into(tensors, weights_only=True, alone=True)
    return {name: model.values[name] if name in model.values else tensors[model.names[name]] for name in wanted}


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


def _empty(entry: TensorStorageMetadata, *, device: str = "cpu") -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _placed(value: Any, map_location: Any) -> Any:
    """A tensor moved as by ``torch.load``, which takes four kinds of ``map_location``; any other value as it is."""
    if map_location is None or not isinstance(value, Tensor):
        return value
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)
