"""The state of an optimizer of a sharded model in checkpoints: by FQN if sharded, by parameter number in full files.

torch's own getter and setter step an optimizer that has no state yet. Nothing here steps one: saving reads what the
optimizer keeps, and loading builds it from what the checkpoint holds, after the checkpoint's options, which decide what
a state means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_mics._torch.state_dict import named_shards, sharded_names
from lightning_mics.checkpoint.content.containers import leaves, mapped, nested
from lightning_mics.checkpoint.content.placing import WHOLE, empty_placed, positional, shard_dim
from lightning_mics.checkpoint.content.quantized import (
    QUANTIZED_KEY,
    dequantized,
    is_quantized,
    position,
    requantize,
)
from lightning_mics.checkpoint.content.state_record import StateRecord
from lightning_mics.checkpoint.content.stored_tensor import StoredTensor, untouched
from lightning_mics.checkpoint.content.trial_step import state_after_a_trial_step
from lightning_mics.checkpoint.errors import CheckpointMismatchError


def optimizer_state(model: nn.Module, optimizer: Optimizer, *, sharded: bool) -> dict[str, Any]:
    """Get the state of an optimizer of a sharded model; every rank calls it.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters.
        sharded: Whether each rank gets its own shards, or rank 0 the unsharded state.

    Returns:
        If ``sharded`` this rank's shards (DTensors), by FQN. Otherwise the unsharded state on rank 0, by the number of
        the parameter in the model, and nothing on the other ranks.
    """
    state = optimizer.state_dict()
    if not sharded:
        whole = mapped(state, _gathered)
        if any(is_quantized(value) for _, value in leaves(state)):
            whole[QUANTIZED_KEY] = True
        return _numbered_as_in_model(model, optimizer, whole) if dist.get_rank() == 0 else {}
    if "param_groups" not in state:  # a stand-in for no optimizer
        return state
    names = _names_by_number(model, optimizer, state)
    return {
        **state,
        "state": {names.get(number, number): slots for number, slots in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


@dataclass(frozen=True, kw_only=True)
class StoredState:
    """The state of one optimizer in a checkpoint, by FQN.

    Attributes:
        values: Nested dicts and lists of tensors, read or not, and other values.
        read: Function that fills tensors from the checkpoint, in place: given by the names of unread ones. Every rank
            calls it, and gets the values that are no tensors.
        record: What the checkpoint says of its own sharding; None if it was written by something that says nothing.
    """

    values: Mapping[str, Any]
    read: Callable[[Mapping[str, Tensor | None]], Mapping[str, Any]]
    record: StateRecord | None = None

    def under(self, *path: Any) -> dict[tuple[Any, ...], Any]:
        """The values whose path begins with ``path``, by path."""
        inside = _at(self.values, path)
        return {} if inside is None else {(*path, *inner): value for inner, value in leaves(inside)}

    def fill(self, targets: Mapping[tuple[Any, ...], Tensor | None]) -> dict[tuple[Any, ...], Any]:
        """Values for paths: in the given tensors, or as they are where none is given; every rank calls it."""
        stored = {path: _at(self.values, path) for path in targets}
        unread: dict[str, tuple[Any, ...]] = {}  # the first path of each name
        for path, value in stored.items():
            if untouched(value):
                unread.setdefault(value.key, path)
        found = self.read({name: _own_part(targets[path]) for name, path in unread.items()})
        filled: dict[tuple[Any, ...], Any] = {}
        for path, value in stored.items():
            target = targets[path]
            if untouched(value) and unread[value.key] == path:
                filled[path] = found[value.key] if target is None else target
            elif target is None:
                filled[path] = value.clone() if isinstance(value, Tensor) else value  # never a view of the file
            else:
                filled[path] = _copied(value, target)
        return filled


def load_optimizer(model: nn.Module, optimizer: Optimizer, key: str, *, stored: StoredState) -> None:
    """Load an optimizer: its options and the states of its parameters, without a step; every rank calls it.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters.
        key: Key of the optimizer in the checkpoint.
        stored: The state in the checkpoint.

    Raises:
        CheckpointMismatchError: If parameter groups differ, or the checkpoint has the state of another kind of
            optimizer.
    """
    if not stored.values:
        return
    own = [
        {**group, "params": of_group}
        for group, of_group in zip(optimizer.param_groups, names_in_groups(model, optimizer), strict=True)
    ]
    saved = _stored_groups(key, stored)
    _check_groups(key, own, saved)
    of_groups = {name for group in own for name in group["params"]}
    shards = {name: shard for name, shard in named_shards(model).items() if name in of_groups}
    _check_kind(key, optimizer, own, saved, stored, shards)
    groups = [{**group, **options, "params": group["params"]} for group, options in zip(own, saved, strict=True)]
    rest = {path: value for path, value in leaves(stored.values) if path[0] not in ("param_groups", QUANTIZED_KEY)}
    inner = _target_of_inner(stored, shards)
    filled = stored.fill({**_targets(key, optimizer, groups, rest, stored.record, shards), **inner})
    own_bytes = next((filled.pop(path).to_local() for path in inner), None)
    loaded = nested(filled) if filled else {}
    if stored.record is not None:
        loaded = stored.record.containers.restore(loaded, key)
    optimizer.load_state_dict({**loaded, "state": loaded.get("state", {}), "param_groups": groups})
    if _has_quantized(key, stored):
        requantize(optimizer, key, groups=groups, shards=shards, own_bytes=own_bytes)


def numbered_as_named(
    model: nn.Module, optimizer: Optimizer, unsharded: Mapping[str, Any], *, names: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Turn an unsharded state by parameter number into one by FQN.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters, in the order of the numbers.
        unsharded: State as in the ``state_dict`` of an optimizer of an unsharded model; or by FQN already.
        names: FQNs in the order of the numbers, if the checkpoint knows them.
    """
    if "param_groups" not in unsharded:
        return dict(unsharded)
    of_model = sharded_names(model)
    own = [of_model[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if names and all(isinstance(name, str) for name in names):
        own = list(names)
    numbers = [number for group in unsharded["param_groups"] for number in group["params"]]
    known = {
        number: number if isinstance(number, str) else own[index] if index < len(own) else f"parameter {index}"
        for index, number in enumerate(numbers)
    }
    return {
        **unsharded,
        "state": {known.get(number, number): slots for number, slots in unsharded["state"].items()},
        "param_groups": [
            {**group, "params": [known[number] for number in group["params"]]} for group in unsharded["param_groups"]
        ],
    }


def names_in_groups(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The FQNs of the parameters in each group of an optimizer.

    Args:
        model: The sharded model.
        optimizer: An optimizer of the model's parameters.
    """
    names = sharded_names(model)
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def prefixes(names: Iterable[str]) -> set[str]:
    """The names and their dotted prefixes: for "a.b.c" also "a" and "a.b"."""
    return {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}


# -- saving ------------------------------------------------------------------------------------------------------------


def _names_by_number(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[Any, str]:
    names = sharded_names(model)
    numbered = {}
    for index, (group, packed) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        for parameter, number in zip(group["params"], packed["params"], strict=True):
            if id(parameter) not in names:
                raise ValueError(
                    f"parameter group {index} of {type(optimizer).__name__} holds a tensor of shape "
                    f"{tuple(parameter.shape)} that is not a parameter of the sharded model, so it cannot be saved; "
                    "make the optimizer after sharding, from the model's own parameters"
                )
            numbered[number] = names[id(parameter)]
    return numbered


def _numbered_as_in_model(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The same state with the numbers that Lightning's strategies for sharded models take for positions among the
    model's parameters; ``load_state_dict`` of an optimizer goes by the order in its groups.
    """
    numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    own = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if "param_groups" not in state or not all(parameter in numbers for parameter in own):
        return state
    packed = [number for group in state["param_groups"] for number in group["params"]]
    new = {number: numbers[parameter] for number, parameter in zip(packed, own, strict=True)}
    return {
        **state,
        "state": {new.get(number, number): slots for number, slots in state["state"].items()},
        "param_groups": [
            {**group, "params": [new[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def _gathered(value: Any) -> Any:
    """An unsharded copy on the CPU, or on other ranks than 0 nothing; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    if is_quantized(value):
        value = dequantized(value)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None


# -- loading -----------------------------------------------------------------------------------------------------------


def _stored_groups(key: str, stored: StoredState) -> list[dict[str, Any]]:
    entries = stored.under("param_groups")
    filled = stored.fill({path: _empty(value) for path, value in entries.items()})
    groups = nested({path[1:]: value for path, value in filled.items()}) if filled else []
    if stored.record is not None:
        groups = stored.record.containers.restore(groups, f"{key}.param_groups")
    return list(groups)


def _targets(
    key: str,
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    entries: Mapping[tuple[Any, ...], Any],
    record: StateRecord | None,
    shards: Mapping[str, nn.Parameter],
) -> dict[tuple[Any, ...], Tensor | None]:
    """Tensors to read into, sharded as the optimizer keeps them, and nothing for what is no tensor; by path."""
    targets: dict[tuple[Any, ...], Tensor | None] = {}
    unknown: dict[tuple[Any, ...], Any] = {}
    any_shard = next(iter(shards.values()), None)
    for path, value in entries.items():
        parameter = shards.get(path[1]) if len(path) > 2 and path[0] == "state" else None
        name = ".".join(map(str, (key, *path)))
        if not isinstance(value, Tensor):
            targets[path] = None
        elif record is not None and name in record.dims:
            targets[path] = _empty(value, any_shard if parameter is None else parameter, record.dims[name])
        elif parameter is not None and value.shape == parameter.shape:
            targets[path] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        elif parameter is None or record is not None or path[-1] == "step":
            targets[path] = _empty(value)
        elif isinstance(value, StoredTensor) and value.split_dim is not None:
            targets[path] = _empty(value, parameter, value.split_dim)
        else:
            unknown[path] = value
    if unknown:
        tried = state_after_a_trial_step(optimizer, groups, {path[1]: shards[path[1]] for path in unknown})
        for path, value in unknown.items():
            kind = _at(tried, path[1:])
            targets[path] = _empty(value, kind, shard_dim(kind)) if isinstance(kind, DTensor) else _empty(value)
    return {path: targets[path] for path in entries}


def _empty(stored: Any, like: Any = None, dim: int | None = None) -> Tensor | None:
    """A tensor to read a stored one into: on the mesh of ``like`` along ``dim``, or plain if either is None."""
    if not isinstance(stored, Tensor):
        return None
    if not isinstance(like, DTensor) or dim is None:
        return torch.empty(stored.shape, dtype=stored.dtype)
    return empty_placed(stored.shape, stored.dtype, like.device_mesh, dim)


def _own_part(target: Tensor | None) -> Tensor | None:
    """The tensor to read into: of one that every rank holds whole, that itself."""
    whole = isinstance(target, DTensor) and all(placement.is_replicate() for placement in target.placements)
    return target.to_local() if whole else target  # type: ignore[union-attr]


def _copied(value: Tensor, target: Tensor) -> Tensor:
    """The target, filled with an unsharded tensor that this rank has."""
    whole = value.values() if isinstance(value, StoredTensor) else value
    if not isinstance(target, DTensor):
        return target.copy_(whole)
    if shard_dim(target) == WHOLE:
        target.to_local().copy_(whole)
        return target
    return target.copy_(
        distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    )


def _at(state: Any, path: Sequence[Any]) -> Any:
    for key in path:
        keyed = isinstance(state, Mapping) and key in state
        indexed = isinstance(state, list | tuple) and isinstance(key, int) and key < len(state)
        if not (keyed or indexed):
            return None
        state = state[key]
    return state


def _has_quantized(key: str, stored: StoredState) -> bool:
    """Whether the optimizer that was saved kept quantized states; checkpoints of earlier versions have values alone."""
    recorded = stored.record.quantized if stored.record is not None else ()
    return QUANTIZED_KEY in stored.values or any(name.startswith(f"{key}.") for name in recorded)


def _target_of_inner(stored: StoredState, shards: Mapping[str, nn.Parameter]) -> dict[tuple[Any, ...], DTensor]:
    """A tensor to read this rank's codes and scales into, by path; nothing if they were saved for other shards."""
    like = next((shard for shard in shards.values() if isinstance(shard, DTensor)), None)
    if like is None:
        return {}
    path = (QUANTIZED_KEY, position(like))
    found = _at(stored.values, path)
    if not isinstance(found, Tensor):
        return {}
    own = torch.empty(found.shape, dtype=found.dtype, device=like.to_local().device)
    return {path: positional(own, like.device_mesh)}


def _check_groups(key: str, groups: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> None:
    for index, group in enumerate(groups):
        own = group["params"]
        saved = list(stored[index]["params"]) if index < len(stored) else []
        if index >= len(stored) or set(own) != set(saved):
            different = sorted(set(own) ^ set(saved))
            raise CheckpointMismatchError(
                f"parameter group {index} of {key} has {len(own)} parameters, in the checkpoint {len(saved)}; only one "
                f"has {different[:3]}"
            )
    if len(stored) > len(groups):
        raise CheckpointMismatchError(
            f"{key} has {len(groups)} parameter groups, and {len(stored)} in the checkpoint: groups that were added "
            "while training must be there before it is loaded; add them in `configure_optimizers`, or in `on_fit_start`"
        )


def _check_kind(
    key: str,
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    stored: StoredState,
    shards: Any,
) -> None:
    """Check that the checkpoint's options are the optimizer's. torch adds options over time, so that one kind of
    optimizer may lack some; another kind has others, too.
    """
    if not saved or not optimizer.defaults:
        return
    lacking = [option for option in optimizer.defaults if option not in saved[0]]
    unknown = [option for option in saved[0] if option not in groups[0]]
    if not (lacking and unknown):
        return
    with_state = {path[1] for path in stored.under("state") if path[1] in shards}
    tried = state_after_a_trial_step(optimizer, groups, {name: shards[name] for name in sorted(with_state)[:1]})
    missing = [
        f"{key}.state.{name}.{slot}"
        for name, slots in tried.items()
        for slot in slots
        if not stored.under("state", name, slot)
    ]
    missing += [f"{key}.param_groups.0.{option}" for option in lacking]
    raise CheckpointMismatchError(
        f"the checkpoint lacks {len(missing)} entries of {key} ({type(optimizer).__name__}), for instance "
        f"{missing[:3]}; it was saved with another kind of optimizer"
    )
