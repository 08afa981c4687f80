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

from lightning_mics.checkpoint.compare import _check_count, _check_model
from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import saving
from lightning_mics.checkpoint.keys import _numbered, _of_rank, _source_of_rank_state
from lightning_mics.checkpoint.optimizer_states import copy_state, dotted, load_optimizer, named, prefixes
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.checkpoint.storage.store import checkpoint_place
from lightning_mics.collectives.agreement import on_rank_0

NAMES_KEY = "mics_names"  # in a full file


@dataclass(frozen=True, kw_only=True)
class FullNames:
    """What users call the model and its optimizers in a full file, where the Trainer has names of its own.

    Attributes:
        model: A key of the file.
        optimizers: Likewise, in their order.
    """

    model: str
    optimizers: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """What to add to the file, so that whoever loads it knows."""
        return {NAMES_KEY: {"model": self.model, "optimizers": list(self.optimizers)}}

    @classmethod
    def said_by(cls, content: Mapping[str, Any]) -> FullNames | None:
        """What a file says."""
        return cls(**content[NAMES_KEY]) if NAMES_KEY in content else None


def save_full(path: StoragePath, *, write: Callable[[Any], None]) -> None:
    """Let rank 0 write a checkpoint to the one file ``path``, in place of one that is there; every rank calls it.

    Args:
        path: Where to.
        write: Writes the file; called on rank 0.

    Raises:
        OSError: If storage fails.
        IsADirectoryError: If ``path`` is a directory with anything else in it than a sharded checkpoint.
    """
    with saving(path):
        # see [Note: How a checkpoint becomes visible]
        on_rank_0(lambda: checkpoint_place(path).replace_by_file(write))


def gather_rank_states(rank_state: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """What each rank has of its own, for a full file: all of it on rank 0, nothing on the others; all call it."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rank_state, states)
    return {_of_rank(rank): state for rank, state in enumerate(states or [])}


def load_raw(path: StoragePath, model: nn.Module, *, strict: bool, weights_only: bool) -> None:
    """Load a file with a plain ``state_dict``, or a checkpoint's, into a module, sharded or not; every rank calls it.

    Args:
        path: The file.
        model: Gets the weights, in place.
        strict: Whether the names must be those of the module.
        weights_only: As of :func:`load`.

    Raises:
        ValueError: If ``path`` is no file, or holds no dictionary.
        RuntimeError: If ``strict`` and the names differ, or a shape does.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a file with a state_dict nor a sharded checkpoint")
    content = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, no state_dict")
    state = content.get("state_dict", content)
    _check_model(get_model_state_dict(model), state, strict=strict)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))


def _load_full(
    path: StoragePath,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rank_state: dict[str, Tensor],
    names: FullNames | None,
    strict: bool,
    weights_only: bool,
) -> dict[str, Any]:
    content: Any = load_value(path, name=str(path), weights_only=weights_only, mapped=True)
    if isinstance(content, dict):
        content = _with_trainers_names(content, names)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    model_state = content.pop("state_dict")
    _check_model(get_model_state_dict(model), model_state, strict=strict)
    states = content.pop("optimizer_states", [])
    _check_count(optimizers, len(states))
    for (key, optimizer), state in zip(_numbered(optimizers).items(), states, strict=False):
        whole = {key: named(model, optimizer, state)}
        load_optimizer(model, optimizer, key, stored=prefixes(dotted(whole)), read=partial(copy_state, whole))
    set_model_state_dict(model, model_state, options=StateDictOptions(full_state_dict=True, strict=strict))
    copy_state(content.get(_source_of_rank_state(content.keys()), {}), rank_state)
    return content


def _with_trainers_names(content: dict[str, Any], names: FullNames | None) -> dict[str, Any]:
    names = FullNames.said_by(content) or names
    if "state_dict" in content or names is None or names.model not in content:
        return content
    rest = {key: value for key, value in content.items() if key not in (names.model, *names.optimizers, NAMES_KEY)}
    states = [content[name] for name in names.optimizers if name in content]
    return {**rest, "state_dict": content[names.model], "optimizer_states": states}
