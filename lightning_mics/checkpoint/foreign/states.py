"""States of optimizers and other entries that other programs have saved with DCP, in the form that loading expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mics.checkpoint.content.containers import leaves, mapped, nested
from lightning_mics.checkpoint.content.stored_tensor import StoredTensor, StoredValue, untouched

Read = Callable[[Mapping[str, Tensor | None]], Mapping[str, Any]]


def settled_states(state: dict[str, Any], parameters: Sequence[str], read: Read) -> dict[str, Any]:
    """The state of an optimizer by FQN, or by number where it was saved by number; every rank calls it.

    Args:
        state: State of the optimizer, whose values are not read yet.
        parameters: FQN of the one parameter of each group, where options are stored by parameter; otherwise none.
        read: Function that returns the values of unread ones by name.
    """
    if parameters:
        groups = [{**group, "params": [name]} for group, name in zip(state["param_groups"], parameters, strict=True)]
        return {**state, "param_groups": groups}
    if not state.get("state") or not all(str(name).isdigit() for name in state["state"]):
        return state
    put = _values_of(state.get("param_groups", []), read)
    if not all(isinstance(name, int) for group in put for name in group["params"]):
        return state  # parameters whose FQNs are numbers
    return {**state, "state": {int(name): slots for name, slots in state["state"].items()}, "param_groups": put}


def regrouped(state: Mapping[str, Any], groups: Sequence[Sequence[str]], read: Read) -> Mapping[str, Any]:
    """A state whose options are stored by parameter, with the groups of an optimizer; every rank calls it.

    Args:
        state: State by FQN. Any other is returned unchanged.
        groups: FQNs of the parameters of each group of the optimizer.
        read: Function that returns the values of unread ones by name.
    """
    stored = state.get("param_groups", [])
    single = all(isinstance(group.get("params"), list) and len(group["params"]) == 1 for group in stored)
    if not stored or not single or [group["params"] for group in stored] == [list(group) for group in groups]:
        return state
    put = {group["params"][0]: {**group, "params": None} for group in _values_of(stored, read)}
    if put.keys() != {name for group in groups for name in group}:
        return state
    options = [[put[name] for name in group] for group in groups]
    if any(each != of_group[0] for of_group in options for each in of_group):
        return state
    merged = [{**of_group[0], "params": list(group)} for of_group, group in zip(options, groups, strict=True) if group]
    return {**state, "param_groups": merged}


def entries_of(values: Mapping[tuple[Any, ...], Any], read: Read) -> dict[str, Any]:
    """Read the entries that are neither the model's nor an optimizer's; every rank calls it.

    Args:
        values: Unread values by path.
        read: Function that reads values by name, and fills tensors.
    """
    if not values:
        return {}
    put: dict[str, Any] = _values_of(nested(values), read)
    return put


def _values_of(state: Any, read: Read) -> Any:
    """The same nested containers with everything read, and unsharded tensors."""
    unread = [value for _, value in leaves(state) if untouched(value)]
    found = read({value.key: _empty(value) for value in unread})
    return mapped(state, lambda value: found[value.key] if untouched(value) else value)


def _empty(value: StoredTensor | StoredValue) -> Tensor | None:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, StoredTensor) else None
