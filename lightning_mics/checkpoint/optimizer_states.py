"""The state of an optimizer of a sharded model, as checkpoints keep it: by parameter name, or by number in full files.

torch's own setter takes the state as the optimizer of today would shape it; what follows reads the checkpoint's options
first, leaves alone the parameters that had no state yet, and refuses the state of another kind of optimizer.
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
    """The state of ``optimizer`` of a sharded model; every rank calls it.

    Returns:
        If ``sharded`` each rank's part, by parameter name. Else the whole on rank 0, by number as in the
        ``state_dict`` of a plain optimizer, and nothing on the other ranks.
    """
    untouched = not optimizer.state
    options = StateDictOptions(full_state_dict=not sharded, cpu_offload=not sharded)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if untouched:  # torch filled it by a step with zero gradients, which is one step too many for Adam
        optimizer.state.clear()
        state = {**state, "state": {}} if state else {}
    return state if sharded or not state else _renamed(state, {name: i for i, name in enumerate(_names(state))})


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, key: str, *, stored: Set[str], read: Callable[[dict[str, Any]], None]
) -> None:
    """Load the options first, since they decide what the state holds, then the state of those parameters that had one.

    Args:
        model: The sharded model.
        optimizer: Of its parameters.
        key: The optimizer's in the checkpoint.
        stored: Every name in the checkpoint and every prefix of one.
        read: Fills a nested dict of such names from the checkpoint, in place; what that lacks keeps its value.
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


def _fresh_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What the optimizer holds after a first step, by parameter name: the shapes to read into."""
    optimizer.zero_grad()
    optimizer.state.clear()
    return get_optimizer_state_dict(model, optimizer)


def copy_state(whole: Any, into: Any) -> None:
    """Copy what a whole state holds into a sharded one, this rank's part of each tensor; no communication."""
    for key in into.keys() & whole.keys() if isinstance(into, dict) else range(min(len(into), len(whole))):
        value, own = whole[key], into[key]
        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
        elif isinstance(own, dict) or key == "param_groups":
            copy_state(value, own)
        else:
            into[key] = value.clone() if isinstance(value, Tensor) else value  # never a view of the file


def named(model: nn.Module, optimizer: Optimizer, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state by number, as plain optimizers have it, turned into one by parameter name."""
    names = _names(get_optimizer_state_dict(model, optimizer))
    return _renamed(whole, _new_names(whole, names))


def _names(optimizer_state: Mapping[str, Any]) -> list[Any]:
    return [name for group in optimizer_state["param_groups"] for name in group["params"]]


def _new_names(optimizer_state: Mapping[str, Any], names: Sequence[str]) -> dict[Any, str]:
    """Numbers become the names in that place; a consolidated checkpoint has names already."""
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


def dotted(state: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(state, Mapping) or (isinstance(state, list) and any(isinstance(entry, Mapping) for entry in state)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from dotted(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix(".")


def prefixes(names: Iterable[str]) -> set[str]:
    """Each name with its beginnings: of "a.b.c" also "a" and "a.b"."""
    return {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}


def _check_groups(
    key: str, names: Sequence[Sequence[str]], loaded: Sequence[Mapping[str, Any]], stored: Set[str]
) -> None:
    for index, (own, group) in enumerate(zip(names, loaded, strict=True)):
        if f"{key}.param_groups.{index}" not in stored or set(own) != set(group["params"]):
            different = sorted(set(own) ^ set(group["params"]))
            raise RuntimeError(
                f"parameter group {index} of {key} has {len(own)} parameters, that of the checkpoint "
                f"{len(group['params'])}; only one has {different[:3]}"
            )
    if f"{key}.param_groups.{len(names)}" in stored:
        raise RuntimeError(f"{key} has more than {len(names)} parameter groups in the checkpoint")


def _check_kind(key: str, optimizer: Optimizer, wanted: Mapping[str, Any], stored: Set[str]) -> None:
    """A parameter without gradients has no state, and torch adds options over time; what makes another kind is more."""
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
