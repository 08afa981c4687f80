"""Sharded checkpoints: a directory that every rank writes a part of, and that loads on any number of ranks.

``torch.distributed.checkpoint`` stores and reshards; here is what surrounds it. A directory holds the model under the
key ``model``, optimizers under ``optimizer_0``, ``optimizer_1``, ..., and everything else in ``meta.pt``: the keys that
Lightning's ``consolidate_checkpoint`` reads. Replicas do not write twice: each tensor is written by one of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

META_FILE = "meta.pt"


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a directory that :func:`save_sharded` wrote."""
    return path.is_dir() and (path / META_FILE).is_file()


def save_sharded(
    path: Path, *, model_state: dict[str, Any], optimizer_states: Sequence[dict[str, Any]], meta: dict[str, Any]
) -> None:
    """Write a checkpoint to the directory ``path``, in place of one that is there; every rank calls it.

    The files are written beside ``path`` and moved there when all ranks have finished, so shards of an earlier
    checkpoint, perhaps of more ranks, never mix with the new ones. Files that are not a checkpoint's stay.

    Args:
        path: The same on all ranks, on storage that all ranks share.
        model_state: Tensors by parameter name; DTensors for what is sharded.
        optimizer_states: One per optimizer, from :func:`optimizer_state`.
        meta: What is not sharded; rank 0's is written.
    """
    unfinished, former = path.with_name(f".{path.name}.unfinished"), _former(path)

    def prepare() -> None:
        _put_back(path, former)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        torch.save(meta, unfinished / META_FILE)
        if os.path.lexists(path):
            path.rename(former)
        try:
            unfinished.rename(path)
        finally:
            _put_back(path, former)

    _on_rank_0(prepare)
    save_shards({"model": model_state, **_numbered(optimizer_states)}, checkpoint_id=unfinished)
    _on_rank_0(finish)


def save_full(path: Path, *, write: Callable[[Path], None]) -> None:
    """Let rank 0 write a checkpoint to the one file ``path``, in place of one that is there; every rank calls it.

    Args:
        path: Where to.
        write: Writes the file; called on rank 0.

    Raises:
        IsADirectoryError: If ``path`` is a directory with anything else in it than a sharded checkpoint.
    """
    former = _former(path)

    def replace() -> None:
        _put_back(path, former)
        if path.is_dir():
            if not is_sharded(path) or any(map(_is_foreign, path.iterdir())):
                raise IsADirectoryError(f"{path} is a directory that holds other files than a checkpoint's")
            path.rename(former)
        try:
            write(path)
        finally:
            _put_back(path, former)

    _on_rank_0(replace)


def load(
    path: Path, *, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool
) -> dict[str, Any]:
    """Load a checkpoint into a sharded model and its optimizers, in place; every rank calls it.

    Args:
        path: A directory of :func:`save_sharded`, of any number of ranks and any partition size, or one full file.
        model: The sharded model.
        optimizers: In the order of saving; those that the checkpoint holds are loaded.
        strict: Whether the checkpoint's parameters must be those of the model.
        weights_only: Whether what is neither model nor optimizer may be plain data only.

    Returns:
        What is neither model nor optimizer.

    Raises:
        ValueError: If ``path`` is no checkpoint.
        RuntimeError: If ``strict`` and the parameters differ, or the optimizers are not those of the checkpoint.
    """
    if is_sharded(path):
        return _load_sharded(path, model=model, optimizers=optimizers, strict=strict, weights_only=weights_only)
    if path.is_file():
        return _load_full(path, model=model, optimizers=optimizers, strict=strict, weights_only=weights_only)
    raise ValueError(
        f"{str(path)!r} does not point to a valid checkpoint: neither a file nor a directory with {META_FILE} in it"
    )


def optimizer_state(model: nn.Module, optimizer: Optimizer, *, sharded: bool) -> dict[str, Any]:
    """The state of ``optimizer`` of a sharded model; every rank calls it.

    Returns:
        If ``sharded`` each rank's part, by parameter name. Else the whole on rank 0, by number as in the
        ``state_dict`` of a plain optimizer, and nothing on the other ranks.
    """
    untouched = not optimizer.state
    options = StateDictOptions(full_state_dict=not sharded, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if untouched:  # torch filled it by a step with zero gradients, which is one step too many for Adam
        optimizer.state.clear()
        state = {**state, "state": {}} if state else {}
    return state if sharded or not state else _renamed(state, {name: i for i, name in enumerate(_names(state))})


def _load_sharded(
    path: Path, *, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool
) -> dict[str, Any]:
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    model_state = get_model_state_dict(model)
    _check_model(
        model_state,
        {name.removeprefix("model."): entry for name, entry in stored.items() if name.startswith("model.")},
        strict=strict,
    )
    saved = {name.split(".")[0] for name in stored if name.startswith("optimizer_")}
    _check_count(optimizers, len(saved))
    prefixes = _prefixes(stored)
    for key, optimizer in _numbered(optimizers if saved else []).items():
        _load_optimizer(model, optimizer, key, stored=prefixes, read=partial(_read, path))
    _read(path, {"model": model_state})
    set_model_state_dict(model, model_state)
    meta: dict[str, Any] = torch.load(path / META_FILE, map_location="cpu", weights_only=weights_only)
    return meta


def _load_full(
    path: Path, *, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool
) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{str(path)!r} does not point to a valid checkpoint: the file holds no 'state_dict'")
    model_state = content.pop("state_dict")
    _check_model(get_model_state_dict(model), model_state, strict=strict)
    states = content.pop("optimizer_states", [])
    _check_count(optimizers, len(states))
    for (key, optimizer), state in zip(_numbered(optimizers).items(), states, strict=False):
        names = _names(get_optimizer_state_dict(model, optimizer))
        named = {key: _renamed(state, _new_names(state, names))}
        _load_optimizer(model, optimizer, key, stored=_prefixes(_dotted(named)), read=partial(_copy, named))
    set_model_state_dict(model, model_state, options=StateDictOptions(full_state_dict=True, strict=strict))
    return content


def _load_optimizer(
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


def _read(path: Path, state: dict[str, Any]) -> None:
    # partial: what the checkpoint lacks keeps its value; whether that is allowed is checked elsewhere
    load_shards(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))


def _copy(whole: Any, into: Any) -> None:
    """Copy what a whole state holds into a sharded one, this rank's part of each tensor; no communication."""
    for key in into.keys() & whole.keys() if isinstance(into, dict) else range(min(len(into), len(whole))):
        value, own = whole[key], into[key]
        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
        elif isinstance(own, dict) or key == "param_groups":
            _copy(value, own)
        else:
            into[key] = value.clone() if isinstance(value, Tensor) else value  # never a view of the file


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


def _numbered(entries: Sequence[Any]) -> dict[str, Any]:
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def _dotted(state: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(state, Mapping) or (isinstance(state, list) and any(isinstance(entry, Mapping) for entry in state)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _dotted(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix(".")


def _prefixes(names: Iterable[str]) -> set[str]:
    """Each name with its beginnings: of "a.b.c" also "a" and "a.b"."""
    return {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}


def _check_model(model_state: Mapping[str, Any], stored: Mapping[str, Any], *, strict: bool) -> None:
    other = [name for name in model_state.keys() & stored.keys() if _shape(model_state[name]) != _shape(stored[name])]
    if other:
        name = min(other)
        raise RuntimeError(
            f"{len(other)} tensors have another shape in the checkpoint than in the model, for instance {name!r} with "
            f"{_shape(stored[name])} there and {_shape(model_state[name])} here"
        )
    prefixes = _prefixes(stored)  # a dict in the model's state is stored entry by entry
    missing = sorted(model_state.keys() - prefixes)
    unexpected = sorted(name for name in stored if not _prefixes([name]) & model_state.keys())
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"the checkpoint and the model differ: {len(missing)} names are missing in the checkpoint {missing[:3]}, "
            f"{len(unexpected)} are unknown to the model {unexpected[:3]}; load with strict=False to allow it "
            "(in Lightning: `self.strict_loading = False`)"
        )


def _shape(entry: Any) -> list[int] | None:
    size = getattr(entry, "shape", None) if isinstance(entry, Tensor) else getattr(entry, "size", None)
    return None if size is None else list(size)


def _check_count(optimizers: Sequence[Optimizer], saved: int) -> None:
    if saved and optimizers and saved != len(optimizers):
        raise RuntimeError(f"the checkpoint holds the states of {saved} optimizers, the model has {len(optimizers)}")


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


def _on_rank_0(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0 while the others wait; if it fails all ranks raise."""
    failure: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            plain = error if isinstance(error, OSError) else RuntimeError(f"on rank 0: {error!r}")
            dist.broadcast_object_list([plain], src=0)
            raise
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _former(path: Path) -> Path:
    """Where what was at ``path`` waits until its successor is there."""
    return path.with_name(f".{path.name}.former")


def _put_back(path: Path, former: Path) -> None:
    """Keep what ``former`` has: all of it if ``path`` is missing, else the files that are not a checkpoint's."""
    if not os.path.lexists(former):
        return
    if not os.path.lexists(path):
        former.rename(path)
    elif former.is_dir() and not former.is_symlink():
        for entry in filter(_is_foreign, list(former.iterdir())):
            entry.rename(path / entry.name)
        shutil.rmtree(former)
    else:
        former.unlink()


def _is_foreign(entry: Path) -> bool:
    return entry.suffix != ".distcp" and entry.name not in (META_FILE, ".metadata")
