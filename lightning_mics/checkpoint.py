"""Sharded checkpoints: a directory that every rank writes a part of, and that loads on any number of ranks.

``torch.distributed.checkpoint`` stores and reshards; here is what surrounds it. A directory holds the model under the
key ``model``, optimizers under ``optimizer_0``, ``optimizer_1``, ..., and everything else in ``meta.pt``: the keys that
Lightning's ``consolidate_checkpoint`` reads. Replicas do not write twice: each tensor is written by one of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
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
    unfinished = path.with_name(f".{path.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dcp.save({"model": model_state, **_numbered(optimizer_states)}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        torch.save(meta, unfinished / META_FILE)
        _replace(path, unfinished)
    dist.barrier()


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
    options = StateDictOptions(full_state_dict=not sharded, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return state if sharded or not state else _renamed(state, {name: i for i, name in enumerate(_names(state))})


def _load_sharded(
    path: Path, *, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool
) -> dict[str, Any]:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
    model_state = get_model_state_dict(model)
    if strict:
        _check_names(model_state, {name.removeprefix("model.") for name in stored if name.startswith("model.")})
    saved = {name.split(".")[0] for name in stored if name.startswith("optimizer_")}
    _check_count(optimizers, len(saved))
    _read({"model": model_state}, path)
    set_model_state_dict(model, model_state)
    for key, optimizer in _numbered(optimizers if saved else []).items():
        state = get_optimizer_state_dict(model, optimizer)
        _check_complete(key, state, stored)
        _read({key: state}, path)
        set_optimizer_state_dict(model, optimizer, state)
    meta: dict[str, Any] = torch.load(path / META_FILE, map_location="cpu", weights_only=weights_only)
    return meta


def _load_full(
    path: Path, *, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool
) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    model_state = content.pop("state_dict")
    if strict:
        _check_names(get_model_state_dict(model), model_state.keys())
    states = content.get("optimizer_states", [])
    _check_count(optimizers, len(states))
    whole = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, model_state, options=whole)
    for optimizer, state in zip(optimizers, states, strict=False):
        numbered = dict(enumerate(_names(get_optimizer_state_dict(model, optimizer))))
        set_optimizer_state_dict(model, optimizer, _renamed(state, numbered), options=whole)
    return content


def _names(optimizer_state: Mapping[str, Any]) -> list[str]:
    return [name for group in optimizer_state["param_groups"] for name in group["params"]]


def _renamed(optimizer_state: Mapping[str, Any], new_names: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "state": {new_names[key]: slots for key, slots in optimizer_state["state"].items()},
        "param_groups": [
            {**group, "params": [new_names[key] for key in group["params"]]}
            for group in optimizer_state["param_groups"]
        ],
    }


def _numbered(entries: Sequence[Any]) -> dict[str, Any]:
    return {f"optimizer_{index}": entry for index, entry in enumerate(entries)}


def _read(state: dict[str, Any], path: Path) -> None:
    # partial: what the checkpoint lacks keeps its value; whether that is allowed was checked before
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))


def _check_names(model_state: Mapping[str, Any], stored: Set[str]) -> None:
    missing, unexpected = sorted(model_state.keys() - stored), sorted(stored - model_state.keys())
    if missing or unexpected:
        raise RuntimeError(
            f"the checkpoint and the model differ: {len(missing)} names are missing in the checkpoint {missing[:3]}, "
            f"{len(unexpected)} are unknown to the model {unexpected[:3]}; load with strict=False to allow it "
            "(in Lightning: `self.strict_loading = False`)"
        )


def _check_count(optimizers: Sequence[Optimizer], saved: int) -> None:
    if saved and optimizers and saved != len(optimizers):
        raise RuntimeError(f"the checkpoint holds the states of {saved} optimizers, the model has {len(optimizers)}")


def _check_complete(key: str, state: dict[str, Any], stored: Set[str]) -> None:
    """Options such as ``initial_lr`` may be newer than the checkpoint; tensors may not be missing."""
    wanted = [f"{key}.state.{name}.{slot}" for name, slots in state["state"].items() for slot in slots]
    if missing := sorted(set(wanted) - set(stored)):
        raise RuntimeError(
            f"the checkpoint lacks {len(missing)} tensors of {key}, for instance {missing[:3]}; "
            "was it saved with another kind of optimizer, or with other parameters?"
        )


def _replace(path: Path, finished: Path) -> None:
    """Move the directory ``finished`` to ``path``; files there that are not a checkpoint's move along."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            if entry.suffix != ".distcp" and entry.name not in (META_FILE, ".metadata"):
                entry.rename(finished / entry.name)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    finished.rename(path)
