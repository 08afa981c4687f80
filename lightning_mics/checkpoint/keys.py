"""The keys of a sharded checkpoint: one for the model, one per optimizer, one per rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch.distributed as dist
from torch import nn

MODEL_KEY = "model"


def optimizer_entries(entries: Sequence[Any]) -> dict[str, Any]:
    """Entries of several optimizers, in order, under the key of each."""
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def rank_key(rank: int) -> str:
    """The key of the state that belongs to ``rank`` alone."""
    return f"rank_{rank}"


def rank_key_to_load(keys: Set[str]) -> str:
    """The key of the state that this rank loads from a checkpoint with these ``keys``.

    It is the rank's own if as many ranks have saved the checkpoint as load it, and rank 0's otherwise.
    """
    ranks = dist.get_world_size()
    saved_by_as_many = rank_key(ranks - 1) in keys and rank_key(ranks) not in keys
    return rank_key(dist.get_rank() if saved_by_as_many else 0)


def follow_second_names(model: nn.Module, model_state: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Prepare an unsharded state for a model whose modules have several names: each tensor is loaded by its first.

    torch distributes each module's tensors once. As in one process, the value of the last name is loaded.

    Args:
        model: The model, sharded or not.
        model_state: Tensors of the model by FQN, sharded or not, under all of their names.
        state: Unsharded tensors by FQN, changed in place: second names get the model's own tensors.
    """
    for first, second in _second_names(model):
        if second in state and second in model_state:
            state[first] = state[second]
            state[second] = model_state[second]


def _second_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The first FQN and another FQN of each tensor of a module that has several names."""
    first_of: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = first_of.setdefault(module, name)
        if first != name:
            yield from ((_joined(first, key), _joined(name, key)) for key in (*module._parameters, *module._buffers))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".lstrip(".")
