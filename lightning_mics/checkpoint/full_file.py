"""Checkpoints in one file that holds the unsharded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer

from lightning_mics.checkpoint.compare import check_model, check_optimizer_count
from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import saving
from lightning_mics.checkpoint.keys import follow_second_names, optimizer_entries, rank_key, rank_key_to_load
from lightning_mics.checkpoint.optimizer_states import copy_state, dotted, load_optimizer, named, prefixes
from lightning_mics.checkpoint.storage.location import checkpoint_location
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.collectives.agreement import on_rank_0
from lightning_mics.collectives.control_plane import control_plane

NAMES_KEY = "mics_names"  # in a full file


@dataclass(frozen=True, kw_only=True)
class FullNames:
    """The keys of the model and its optimizers in a full file whose keys are the user's and not the Trainer's.

    Attributes:
        model: Key of the model's state.
        optimizers: Keys of the optimizers' states, in the order of the optimizers.
    """

    model: str
    optimizers: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """An entry for the file, by which it states its own keys when it is loaded."""
        return {NAMES_KEY: {"model": self.model, "optimizers": list(self.optimizers)}}

    @classmethod
    def said_by(cls, content: Mapping[str, Any]) -> FullNames | None:
        """The keys that a file's ``content`` states; None if it states none."""
        return cls(**content[NAMES_KEY]) if NAMES_KEY in content else None


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
    model_state = get_model_state_dict(model)
    check_model(model_state, state, strict=strict)
    state = dict(state)
    follow_second_names(model, model_state, state)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))


def load_full(
    path: StoragePath,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rank_state: dict[str, Tensor],
    names: FullNames | None,
    strict: bool,
    weights_only: bool,
) -> dict[str, Any]:
    """Load a full file into a sharded model and its optimizers, in place; every rank calls it.

    For the result and the errors see :func:`~lightning_mics.checkpoint.loading.load`.

    Args:
        path: The file.
        model: The sharded model.
        optimizers: Optimizers of the model, in the order in which they were saved.
        rank_state: Tensors of this rank, filled if the file has them.
        names: Names under which Fabric saved model and optimizers; None for the Trainer's.
        strict: Whether every parameter and buffer of the model must be in the file.
        weights_only: Whether plain data and tensors only are unpickled.
    """
    content: Any = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if isinstance(content, dict):
        content = _with_trainers_names(content, names)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    model_state = content.pop("state_dict")
    own_state = get_model_state_dict(model)
    check_model(own_state, model_state, strict=strict)
    follow_second_names(model, own_state, model_state)
    states = content.pop("optimizer_states", [])
    check_optimizer_count(optimizers, len(states))
    for (key, optimizer), state in zip(optimizer_entries(optimizers).items(), states, strict=False):
        unsharded = {key: named(model, optimizer, state)}
        load_optimizer(model, optimizer, key, stored=prefixes(dotted(unsharded)), read=partial(copy_state, unsharded))
    set_model_state_dict(model, model_state, options=StateDictOptions(full_state_dict=True, strict=strict))
    copy_state(content.get(rank_key_to_load(content.keys()), {}), rank_state)
    return content


def _with_trainers_names(content: dict[str, Any], names: FullNames | None) -> dict[str, Any]:
    """The content with the Trainer's keys for the model and the optimizers, if ``names`` or the file state others."""
    names = FullNames.said_by(content) or names
    if "state_dict" in content or names is None or names.model not in content:
        return content
    rest = {key: value for key, value in content.items() if key not in (names.model, *names.optimizers, NAMES_KEY)}
    states = [content[name] for name in names.optimizers if name in content]
    return {**rest, "state_dict": content[names.model], "optimizer_states": states}
