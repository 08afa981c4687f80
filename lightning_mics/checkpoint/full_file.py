"""Checkpoints in one file that holds the unsharded model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.checkpoint.content.entries import LoadedEntries, entries_of_all_ranks, place_whole
from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.content.opened import OpenedCheckpoint
from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import saving
from lightning_mics.checkpoint.keys import rank_key
from lightning_mics.checkpoint.storage.location import checkpoint_location
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.collectives.agreement import on_rank_0
from lightning_mics.collectives.control_plane import control_plane

NAMES_KEY = "mics_names"  # in full files of earlier versions, which stated their keys


def save_full(path: StoragePath, *, write: Callable[[Any], None]) -> None:
    """Let rank 0 write a checkpoint to the file ``path``, in place of an earlier one; every rank calls it.

    Args:
        path: Path or URL of the file.
        write: Function that writes the file, given its path; called on rank 0.

    Raises:
        OSError: If storage fails.
        IsADirectoryError: If ``path`` is a directory with other files than those of a sharded checkpoint.
    """
    with saving(path):
        # see [Note: How a checkpoint becomes visible]
        on_rank_0(lambda: checkpoint_location(path).replace_by_file(write))


def save_whole(
    path: StoragePath,
    content: dict[str, Any],
    *,
    write: Callable[[dict[str, Any], Any], None],
    places: bool = True,
) -> None:
    """Save a full file of content that may hold sharded tensors besides the model's; every rank calls it.

    Args:
        path: Path or URL of the file.
        content: Content of the file, with the states of model and optimizers unsharded on rank 0.
        write: Function that writes content to a file, given its path; called on rank 0.
        places: Whether the file says which tensors were sharded, so that loading shards them again.

    Raises:
        OSError: If storage fails.
        RuntimeError: If an entry cannot be pickled; the message names it.
    """
    with saving(path):
        entries = entries_of_all_ranks(content)
    whole = entries.whole()
    unsharded = entries.put_whole(content, whole, places=places)
    with entries.as_calls(whole):
        save_full(path, write=lambda file: write(unsharded, file))


def gather_rank_states(rank_state: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Gather the states that belong to single ranks, for a full file; every rank calls it.

    Returns:
        On rank 0 every rank's ``rank_state``, under the key of the rank; on the others nothing.
    """
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rank_state, states, group=control_plane().group)
    return {rank_key(rank): state for rank, state in enumerate(states or [])}


def load_raw(path: StoragePath, model: nn.Module, *, strict: bool, weights_only: bool) -> None:
    """Load a file with a bare ``state_dict``, or a checkpoint's, into a module, sharded or not; every rank calls it.

    Args:
        path: Path or URL of the file.
        model: The module that gets the weights, in place.
        strict: Whether file and module must have the same names.
        weights_only: Whether the file may hold only plain data and tensors. Otherwise loading may run code.

    Raises:
        ValueError: If ``path`` is not a file, or holds no dictionary.
        RuntimeError: If ``strict`` and the names differ, or if a shape differs.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a file with a state_dict nor a sharded checkpoint")
    content = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, no state_dict")
    state = content.get("state_dict", content)
    set_model_state_dict(model, state, options=StateDictOptions(strict=strict))


def open_full(
    path: StoragePath, *, mesh: Callable[[], DeviceMesh], names: FullNames | None, weights_only: bool
) -> OpenedCheckpoint:
    """Open a full file; every rank calls it. Its tensors are mapped to memory.

    For the errors see :func:`~lightning_mics.checkpoint.loading.load`.

    Args:
        path: The file.
        mesh: Function that returns the mesh of the job, for entries that were sharded.
        names: Keys under which Fabric's user saved model and optimizers; None finds them by their content.
        weights_only: Whether plain data and tensors only are unpickled.
    """
    with LoadedEntries(mesh).unpickled():
        content: Any = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    place_whole(content, mesh)
    stated = content.pop(NAMES_KEY, None)
    if names is not None and names.models and all(key in content for key in names.models):
        content[names.model] = {
            f"{key}.{name}": value for key in names.models for name, value in content.pop(key).items()
        }
    own = None if "state_dict" in content else FullNames(**stated) if stated else _names_in(content, names)
    if own is None and "state_dict" not in content:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    if own is not None:
        model = content.pop(own.model)
        optimizers = [content.pop(name) for name in own.optimizers if name in content]
    else:
        model, optimizers = content.pop("state_dict"), content.pop("optimizer_states", [])
    ranks = {key: content[key] for key in content if re.fullmatch(r"rank_\d+", key)}
    return OpenedCheckpoint(model=model, optimizers=optimizers, entries=content, rank_states=ranks, names=own)


def _names_in(content: Mapping[str, Any], names: FullNames | None) -> FullNames | None:
    """The keys of the model and the optimizers in a file that Fabric has written, by what is there."""
    optimizers = [key for key, value in content.items() if isinstance(value, dict) and "param_groups" in value]
    models = [key for key, value in content.items() if key not in optimizers and _is_state_dict(value)]
    wanted = names.model if names is not None and names.model in content else None
    model = wanted or (models[0] if len(models) == 1 else None)
    return None if model is None else FullNames(model=model, optimizers=optimizers)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())
