"""The state of an optimizer of a sharded model in checkpoints: by FQN if sharded, by parameter number in full files.

torch's own setter expects a state of the shape that the optimizer has now. The functions here load the checkpoint's
options first, leave parameters without a state alone, and reject the state of another kind of optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def optimizer_state(model: nn.Module, optimizer: Optimizer, *, sharded: bool) -> dict[str, Any]:
    """Get the state of an optimizer of a sharded model; every rank calls it.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters.
        sharded: Whether each rank gets its own shards, or rank 0 the unsharded state.

    Returns:
        If ``sharded`` this rank's shards (DTensors), by FQN. Otherwise the unsharded state on rank 0, by number as in
        the ``state_dict`` of an optimizer of an unsharded model, and nothing on the other ranks.
    """
    untouched = not optimizer.state
    options = StateDictOptions(full_state_dict=not sharded, cpu_offload=not sharded)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if untouched:  # torch has run a step with zero gradients to make it, which Adam would count
        optimizer.state.clear()
        state = {**state, "state": {}} if state else {}
    return state if sharded or not state else _renamed(state, {name: i for i, name in enumerate(_names(state))})


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, key: str, *, stored: Set[str], read: Callable[[dict[str, Any]], None]
) -> None:
    """Load an optimizer: first its options, which decide what a state holds, then the states of its parameters.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters.
        key: Key of the optimizer in the checkpoint.
        stored: All FQNs in the checkpoint and all their prefixes.
        read: Function that fills a nested dict of such names from the checkpoint, in place; entries that the checkpoint
            lacks keep their values.

    Raises:
        RuntimeError: If parameter groups differ, or the checkpoint has the state of another kind of optimizer.
    """
    groups = _fresh_state(model, optimizer)["param_groups"]
    names = [group["params"] for group in groups]
    read({key: {"param_groups": groups}})
    _check_groups(key, names, groups, stored)
    for group, params in zip(groups, names, strict=True):
        group["params"] = params
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    wanted = _fresh_state(model, optimizer)["state"]
    _check_kind(key, optimizer, wanted, stored)
    state = {name: slots for name, slots in wanted.items() if f"{key}.state.{name}" in stored}
    read({key: {"state": state}})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def copy_state(unsharded: Any, into: Any) -> None:
    """Copy an unsharded state into a sharded one, this rank's shard of each tensor; without communication.

    Args:
        unsharded: Nested dicts and lists of unsharded tensors and other values.
        into: Nested dicts and lists to fill, with DTensors where sharded; entries that ``unsharded`` lacks keep their
            values.
    """
    for key in into.keys() & unsharded.keys() if isinstance(into, dict) else range(min(len(into), len(unsharded))):
        value, own = unsharded[key], into[key]
        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
        elif isinstance(own, dict) or key == "param_groups":
            copy_state(value, own)
        else:
            into[key] = value.clone() if isinstance(value, Tensor) else value  # never a view of the file


def named(model: nn.Module, optimizer: Optimizer, unsharded: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an unsharded state by parameter number into one by FQN.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters, in the order of the numbers.
        unsharded: State as in the ``state_dict`` of an optimizer of an unsharded model; or by FQN already.
    """
    names = _names(get_optimizer_state_dict(model, optimizer))
    return _renamed(unsharded, _new_names(unsharded, names))


def dotted(state: Any, prefix: str = "") -> Iterable[str]:
    """The FQNs of all values in a nested state, joined by dots.

    Args:
        state: Nested dicts, and lists of dicts; anything else is a value.
        prefix: Beginning of each FQN, with its dot.
    """
    if isinstance(state, Mapping) or (isinstance(state, list) and any(isinstance(entry, Mapping) for entry in state)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from dotted(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix(".")


def prefixes(names: Iterable[str]) -> set[str]:
    """The names and their dotted prefixes: for "a.b.c" also "a" and "a.b"."""
    return {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}


def _fresh_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state after a first step, by FQN: shapes to read into."""
    optimizer.zero_grad()
    optimizer.state.clear()
    return get_optimizer_state_dict(model, optimizer)


def _names(optimizer_state: Mapping[str, Any]) -> list[Any]:
    return [name for group in optimizer_state["param_groups"] for name in group["params"]]


def _new_names(optimizer_state: Mapping[str, Any], names: Sequence[str]) -> dict[Any, str]:
    """The FQN for each number of a state; a consolidated checkpoint has FQNs already."""
    old = _names(optimizer_state)
    known = dict(enumerate(names))
    return {key: key if isinstance(key, str) else known.get(i, f"parameter {i}") for i, key in enumerate(old)}


def _renamed(optimizer_state: Mapping[str, Any], new_names: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "state": {new_names[key]: slots for key, slots in optimizer_state["state"].items() if key in new_names},
        "param_groups": [
            {**group, "params": [new_names[key] for key in group["params"]]}
            for group in optimizer_state["param_groups"]
        ],
    }


def _check_groups(
    key: str, names: Sequence[Sequence[str]], loaded: Sequence[Mapping[str, Any]], stored: Set[str]
) -> None:
    for index, (own, group) in enumerate(zip(names, loaded, strict=True)):
        if f"{key}.param_groups.{index}" not in stored or set(own) != set(group["params"]):
            different = sorted(set(own) ^ set(group["params"]))
            raise RuntimeError(
                f"parameter group {index} of {key} has {len(own)} parameters, in the checkpoint "
                f"{len(group['params'])}; only one has {different[:3]}"
            )
    if f"{key}.param_groups.{len(names)}" in stored:
        raise RuntimeError(f"{key} has more than {len(names)} parameter groups in the checkpoint")


def _check_kind(key: str, optimizer: Optimizer, wanted: Mapping[str, Any], stored: Set[str]) -> None:
    """Check that slots exist for parameters that have a state. A parameter without gradients has none, and an option
    may be missing, since torch adds options over time; so single missing entries do not make another kind.
    """
    missing = [
        f"{key}.state.{name}.{slot}"
        for name, slots in wanted.items()
        for slot in slots
        if f"{key}.state.{name}" in stored and f"{key}.state.{name}.{slot}" not in stored
    ]
    if bool(wanted) != (f"{key}.state" in stored):
        options = [f"{key}.param_groups.0.{option}" for option in optimizer.defaults]
        missing += [option for option in options if option not in stored]
    if missing:
        raise RuntimeError(
            f"the checkpoint lacks {len(missing)} entries of {key} ({type(optimizer).__name__}), for instance "
            f"{missing[:3]}; it was saved with another kind of optimizer"
        )
