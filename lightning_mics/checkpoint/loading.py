"""Loading checkpoints, sharded or full, on any number of ranks.

A checkpoint is opened first: what it holds is known then, and the tensors of a sharded one are not read yet. So it can
be shown to hooks, and loaded afterwards as they have left it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics._torch.state_dict import named_shards
from lightning_mics.checkpoint.compare import check_base, check_model, check_optimizer_count
from lightning_mics.checkpoint.content.containers import leaves, mapped, nested
from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.content.opened import OpenedCheckpoint
from lightning_mics.checkpoint.content.stored_tensor import StoredTensor, StoredValue, untouched
from lightning_mics.checkpoint.content.trained_only import left_out, with_base
from lightning_mics.checkpoint.foreign.folders import holds_shards, open_files, why_not
from lightning_mics.checkpoint.foreign.states import regrouped
from lightning_mics.checkpoint.full_file import open_full
from lightning_mics.checkpoint.keys import MODEL_KEY, rank_key_to_load
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_checkpoint, open_on_all_ranks, open_sharded
from lightning_mics.checkpoint.optimizer_states import StoredState, load_optimizer, names_in_groups, numbered_as_named
from lightning_mics.checkpoint.storage.location import checkpoint_location
from lightning_mics.checkpoint.storage.path import StoragePath, exists, forget_listings
from lightning_mics.collectives.agreement import on_rank_0


def load(
    path: StoragePath,
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    strict: bool,
    weights_only: bool,
    rank_state: dict[str, Tensor] | None = None,
    names: FullNames | None = None,
    needed: Collection[str] = (),
    unset: Collection[str] = (),
    show_progress: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint into a sharded model and its optimizers, in place; every rank calls it.

    Args:
        path: Directory of :func:`save_sharded`, of any number of ranks and any partition size, or a full file.
        model: The sharded model.
        optimizers: The model's optimizers, in the order of saving, or of ``names``.
        strict: Whether the checkpoint's parameters must be those of the model; and with ``names`` its keys those.
        weights_only: Whether entries other than tensors must be plain data. Otherwise loading may run code.
        rank_state: Tensors to fill with those that this rank has saved, or rank 0's if the number of ranks has changed.
            Tensors that the checkpoint lacks keep their values.
        names: Keys of the model and the optimizers; None for the Trainer's.
        needed: Keys of other entries that the checkpoint must have.
        unset: FQNs of frozen parameters without weights, which a checkpoint of what trains alone does not give.
        show_progress: Whether this rank displays progress bars for long operations.

    Returns:
        The entries that are neither the model's nor an optimizer's.

    Raises:
        FileNotFoundError: If nothing is at ``path``.
        ValueError: If ``path`` is not a checkpoint.
        KeyError: If ``strict`` and the checkpoint has no model or optimizer with one of the ``names``, or an entry that
            is ``needed`` is missing.
        DamagedCheckpointError: If files of a directory are missing, cut short or altered.
        UnsafeCheckpointError: If loading would run code of the checkpoint that ``weights_only`` does not allow.
        CheckpointMismatchError: If ``strict`` and the parameters differ, the optimizers are not those of the
            checkpoint, or it holds only what trains and frozen parameters are ``unset``.
    """
    opened = open_to_load(
        path, mesh=lambda: mesh_of(model), weights_only=weights_only, names=names, show_progress=show_progress
    )
    return load_opened(
        opened,
        path=path,
        model=model,
        optimizers=optimizers,
        strict=strict,
        rank_state=rank_state,
        names=names,
        needed=needed,
        unset=unset,
    )


def load_opened(
    opened: OpenedCheckpoint,
    *,
    path: Any,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    strict: bool,
    rank_state: dict[str, Tensor] | None = None,
    names: FullNames | None = None,
    needed: Collection[str] = (),
    unset: Collection[str] = (),
) -> dict[str, Any]:
    """Load all of an opened checkpoint; every rank calls it. For the other arguments and the errors see :func:`load`.

    Args:
        opened: The checkpoint.
        path: Path or name of the checkpoint, in errors.
        model: The sharded model.
        optimizers: The model's optimizers.
        strict: Whether the checkpoint's parameters must be those of the model.
        rank_state: Tensors to fill with those that this rank has saved.
        names: Keys of the model and the optimizers.
        needed: Keys of other entries that the checkpoint must have.
        unset: FQNs of frozen parameters without weights.
    """
    check_base(opened.entries, unset, path=path)
    states = _states_by_key(opened, names, optimizers, strict=strict, path=path)
    missing = sorted(set(needed) - opened.entries.keys())
    if missing:
        raise KeyError(_lacks(path, missing[0]))
    load_optimizers(opened, states, model=model)
    load_model(opened, model=model, strict=strict)
    load_rank_state(opened, rank_state or {})
    return opened.entries


def mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh that a model is sharded over.

    Raises:
        ValueError: If it is not sharded.
    """
    for shard in named_shards(model).values():
        if isinstance(shard, DTensor):
            return shard.device_mesh
    raise ValueError(f"{type(model).__name__} is not sharded")


def open_to_load(
    path: StoragePath,
    *,
    mesh: Callable[[], DeviceMesh],
    weights_only: bool,
    names: FullNames | None = None,
    show_progress: bool = False,
) -> OpenedCheckpoint:
    """Open a checkpoint, check its files and read its entries; every rank calls it.

    For the other arguments and the errors see :func:`load`.

    Args:
        path: Directory or full file.
        mesh: Function that returns the mesh of the job; called if an entry is sharded.
        weights_only: Whether entries other than tensors must be plain data.
        names: Keys of the model and the optimizers in a full file that has not the Trainer's.
        show_progress: Whether this rank displays progress bars.
    """
    on_rank_0(checkpoint_location(path).recover)  # see [Note: How a checkpoint becomes visible]
    forget_listings(path)
    if holds_shards(path):
        checkpoint = open_on_all_ranks(path, show_progress=show_progress, wanted=names)
        checkpoint.check_on_all_ranks()
        return open_sharded(checkpoint, mesh=mesh, weights_only=weights_only)
    if path.is_file():
        return open_full(path, mesh=mesh, names=names, weights_only=weights_only)
    if not exists(path):
        raise FileNotFoundError(f"{str(path)!r} does not point to a valid checkpoint: there is nothing")
    opened = open_files(path, weights_only=weights_only)
    if opened is None:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: {why_not(path)}")
    return opened


def read_entries(path: StoragePath, *, weights_only: bool) -> dict[str, Any]:
    """The entries of a sharded checkpoint, by this process alone; tensors that are sharded are on the meta device.

    It may be called while the checkpoint is opened, to find out what the mesh should be.

    Args:
        path: Directory of the checkpoint; a full file has no entries of its own.
        weights_only: Whether entries must be plain data.
    """
    return entries_of_open(open_checkpoint(path), weights_only=weights_only)


def entries_of_open(checkpoint: OpenCheckpoint, *, weights_only: bool) -> dict[str, Any]:
    """The same for a checkpoint that is open.

    Args:
        checkpoint: The checkpoint.
        weights_only: Whether entries must be plain data.
    """
    return Context().run(checkpoint.meta, weights_only=weights_only)  # outside of the opening


def load_model(opened: OpenedCheckpoint, *, model: nn.Module, strict: bool) -> None:
    """Load the model of an opened checkpoint, in place; every rank calls it.

    Args:
        opened: The checkpoint, whose ``model`` may hold tensors under other names than it was saved with.
        model: The sharded model.
        strict: Whether both must have the same names.

    Raises:
        CheckpointMismatchError: If a shape differs, or if names differ and ``strict``.
    """
    own, state = get_model_state_dict(model), _with_tied(opened.model, model)
    if left_out(opened.entries):
        state = with_base(state, own, model)
    check_model(own, state, strict=strict)
    targets: dict[tuple[Any, ...], Any] = {}
    whole: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and not untouched(value):
            whole[name] = value.values() if isinstance(value, StoredTensor) else value  # its module shards it
        elif name in own and isinstance(value, Tensor) and isinstance(own[name], Tensor):
            targets[name,] = own[name]
        elif name in own:
            targets.update({path: _empty(entry) for path, entry in leaves(value, (name,))})
    loaded = StoredState(values=state, read=opened.read).fill(targets)
    values: dict[str, Any] = nested(loaded) if loaded else {}
    if opened.record is not None:
        values = {
            name: opened.record.containers.restore(value, f"{MODEL_KEY}.{name}") for name, value in values.items()
        }
    set_model_state_dict(model, {**values, **whole}, options=StateDictOptions(strict=strict))


def _with_tied(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` with tied parameters under all of their names: safetensors holds each once."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    whole = dict(state)
    for tied in names.values():
        found = [state[name] for name in tied if name in state]
        whole.update({name: found[0] for name in tied if found and name not in state})
    return whole


def shown_to_hooks(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """The checkpoint as Lightning shows one to hooks; every rank calls it.

    Everything but tensors is read, and the parameters of optimizers are numbered as in one process.

    Args:
        opened: The checkpoint.
    """
    unread = list(_unread_values((opened.model, opened.optimizers)))
    found = opened.read({value.key: None for value in unread})
    put = partial(mapped, change=lambda value: found[value.key] if isinstance(value, StoredValue) else value)
    names = [
        [name for group in state["param_groups"] for name in group["params"]] if "param_groups" in state else []
        for state in map(put, opened.optimizers)
    ]
    optimizers = [_numbered(put(state), of_state) for state, of_state in zip(opened.optimizers, names, strict=True)]
    return replace(opened, model=put(opened.model), optimizers=optimizers, numbered=names)


def load_optimizers(
    opened: OpenedCheckpoint, states: Sequence[tuple[Optimizer, dict[str, Any]]], *, model: nn.Module
) -> None:
    """Load optimizers from an opened checkpoint, in place; every rank calls it.

    Args:
        opened: The checkpoint.
        states: Optimizers with their states: some of ``opened.optimizers``, or others like them.
        model: The sharded model.

    Raises:
        CheckpointMismatchError: If parameter groups differ, or the state is one of another kind of optimizer.
    """
    stored = {name: value for name, value in opened.model.items() if isinstance(value, StoredTensor)}
    renamed = {value.key.removeprefix(f"{MODEL_KEY}."): name for name, value in reversed(stored.items())}
    for index, (optimizer, state) in enumerate(states):
        positions = [position for position, known in enumerate(opened.optimizers) if known is state]
        position = positions[0] if positions else index
        key = f"optimizer_{position}"
        saved = opened.numbered[position] if position < len(opened.numbered) else []
        numbered = [renamed.get(name, name) for name in saved]  # as a hook has named the parameters
        of_names = state if _is_unread(state) else numbered_as_named(model, optimizer, state, names=numbered)
        named = regrouped(of_names, names_in_groups(model, optimizer), opened.read)
        load_optimizer(model, optimizer, key, stored=StoredState(values=named, read=opened.read, record=opened.record))


def _is_unread(state: Mapping[str, Any]) -> bool:
    """Whether the options of an optimizer are not read yet; then its parameters are listed by FQN."""
    return any(isinstance(group.get("params"), StoredValue) for group in state.get("param_groups", ()))


def _unread_values(value: Any) -> Iterator[StoredValue]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _unread_values(entry)
    elif isinstance(value, StoredValue):
        yield value


def _numbered(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A state by FQN as one by number; one that is by number already is returned unchanged."""
    if not all(isinstance(name, str) for name in names):
        return state
    numbers: dict[Any, Any] = {}
    for name in names:
        numbers.setdefault(name, len(numbers))
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    slots = {numbers.get(name, name): slots for name, slots in state.get("state", {}).items()}
    return {**state, "state": slots, "param_groups": groups}


def load_rank_state(opened: OpenedCheckpoint, rank_state: dict[str, Tensor]) -> None:
    """Fill tensors with those that this rank has saved, or rank 0's; every rank calls it.

    Args:
        opened: The checkpoint.
        rank_state: Tensors to fill; those that the checkpoint lacks keep their values.
    """
    saved = opened.rank_states.get(rank_key_to_load(opened.rank_states.keys()), {}) if opened.rank_states else {}
    shared = [(name,) for name in rank_state if name in saved]
    if shared:
        stored = StoredState(values=saved, read=opened.read)
        stored.fill({path: rank_state[path[0]] for path in shared})


# -- keys of the user --------------------------------------------------------------------------------------------------


def _states_by_key(
    opened: OpenedCheckpoint,
    names: FullNames | None,
    optimizers: Sequence[Optimizer],
    *,
    strict: bool,
    path: Any,
) -> list[tuple[Optimizer, dict[str, Any]]]:
    """Each optimizer with its state in the checkpoint: by its key if both have keys, else by position."""
    if names is not None and strict and optimizers and not opened.optimizers:
        raise KeyError(_lacks(path, names.optimizers[0]))
    if names is None or opened.names is None:
        check_optimizer_count(optimizers, len(opened.optimizers))
        return list(zip(optimizers, opened.optimizers, strict=False))
    saved = dict(zip(opened.names.optimizers, opened.optimizers, strict=False))
    lacking = [name for name in (names.model, *names.optimizers) if name not in (opened.names.model, *saved)]
    if strict and lacking:
        raise KeyError(_lacks(path, lacking[0]))
    return [(own, saved[name]) for name, own in zip(names.optimizers, optimizers, strict=True) if name in saved]


def _lacks(path: Any, key: str) -> str:
    return (
        f"{path} has no {key!r}: the requested state contains a key that does not exist in the checkpoint; load with "
        "strict=False to leave it unchanged"
    )


def _empty(value: Any) -> Tensor | None:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else None
