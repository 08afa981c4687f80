"""Checkpoints of Fabric: on a disk, and in the memory of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _move_state_into
from lightning.fabric.utilities.types import _Stateful
from lightning.fabric.wrappers import _unwrap_objects
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_mics import checkpoint
from lightning_mics._torch.fsdp import is_in_iteration
from lightning_mics.checkpoint.content.trained_only import model_state, trained_only_entry
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.foreign.folders import holds_shards
from lightning_mics.checkpoint.opening import open_sharded
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import ORIGIN_KEYS, origin
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.in_memory.reading import InMemoryCheckpoint
from lightning_mics.integrations._fabric_parts import Filter, Parts, filtered
from lightning_mics.integrations._in_memory import InMemoryLoop
from lightning_mics.sharding.optimizers.overflow import SCALER_KEY
from lightning_mics.sharding.ranks.replicas import verify_replicas
from lightning_mics.sharding.sharded import sharded


class FabricCheckpoints:
    """What :class:`~lightning_mics.MiCSFabricStrategy` saves and loads."""

    _in_memory: InMemoryLoop | None = None

    def save_checkpoint(
        self: Any, path: str | Path, state: dict[str, Any], storage_options: Any = None, filter: Filter | None = None
    ) -> None:
        """Save the model, its optimizers and everything else in ``state``; every rank calls it.

        Without a model, as with ``model.state_dict()`` as the state, one file with unsharded tensors is written.

        Args:
            path: Path or URL of the checkpoint.
            state: Models, optimizers, and all else, by their keys.
            storage_options: Not supported.
            filter: Functions of key and entry by the state's keys; they return whether an entry is saved.

        Raises:
            TypeError: If ``storage_options`` are given, which are for a ``CheckpointIO``.
        """
        if storage_options is not None:
            raise TypeError("strategy 'mics' takes no storage_options: pass a URL that fsspec has a driver for")
        models = [value for value in state.values() if isinstance(value, nn.Module) and "_mics" in vars(value)]
        with all_ranks_answer(f"saving {path}", timeout=self._timeout), self._together("saves a checkpoint"):
            if models:
                with_scaler = {**self._scaler(), **state}
                self._save(self._shared_path(path), Parts.of(with_scaler, doing="save"), filter or {})
            else:
                self._save_plain(self._shared_path(path), state, filter or {})

    def _save_plain(self: Any, path: StoragePath, state: dict[str, Any], filter: Filter) -> None:
        """Save one file of whatever is in ``state``, such as a ``state_dict()``, with unsharded tensors."""
        contents = {key: value.state_dict() if isinstance(value, _Stateful) else value for key, value in state.items()}
        kept = {key: filtered(value, filter.get(key)) for key, value in contents.items()}
        checkpoint.save_whole(path, kept, write=torch.save, places=False)

    def _save(self: Any, path: StoragePath, parts: Parts, filter: Filter) -> None:
        full = not self._save_distributed_checkpoint
        states, optimizers, rest = _contents(parts, full=full, save_frozen=self._save_frozen)
        left_out = {} if self._save_frozen else trained_only_entry(parts.model)
        contents = {**parts.divided(states), **optimizers, **rest}
        contents = {key: filtered(value, filter.get(key)) for key, value in contents.items()}
        if full:
            checkpoint.save_whole(path, {**contents, **left_out}, write=torch.save)
            return
        self._saving.save(
            path,
            model_state=parts.joined(contents),
            optimizer_states=[contents[key] for key in optimizers],
            meta={
                **{key: contents[key] for key in rest},
                **left_out,
                **origin(parts.model, parts.first.groups.topology, parts.first.chosen),
            },
            names=parts.names,
        )

    def save_in_memory(self: Any, state: dict[str, Any]) -> None:
        """Save an optimizer step that has just ended in the memory of two nodes; every rank calls it.

        It is copied beside what follows. Call :meth:`load_from_memory` before the loop. Of entries that are neither
        models nor optimizers, rank 0's are saved; the states of each rank's random number generators are saved too.

        Args:
            state: What ``fabric.save`` takes: models, optimizers, and all else.

        Raises:
            RuntimeError: If a step of before was not loaded.
            HostMemoryError: On all ranks, if the hosts have too little memory; at the first save.
            ValueError: If no model in it was set up.
        """
        parts = Parts.of({**self._scaler(), **_unwrap_objects(state)}, doing="strategy.save_in_memory")
        states, optimizers, rest = _contents(parts, full=False, beside=True)
        self._loop_of(parts).save(
            model_state=states,
            optimizer_states=list(optimizers.values()),
            meta={**rest, **origin(parts.model, parts.first.groups.topology, parts.first.chosen)},
            optimizers=parts.optimizers.values(),
            names=parts.names,
        )

    def load_from_memory(self: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """Resume from the newest step in the nodes' memory, if the job was started again; every rank calls it, once.

        Args:
            state: What ``fabric.load`` takes; filled in place.

        Returns:
            Entries that ``state`` has no key for; None if the job begins anew.

        Raises:
            NoWholeStepError: On all ranks, if the job was started again and no step is whole. The newest checkpoint of
                a disk may be loaded then.
        """
        parts = Parts.of({**self._scaler(), **_unwrap_objects(state)}, doing="strategy.load_from_memory")

        plain = self._reads_weights_only(None)

        def fill(stored: InMemoryCheckpoint, own: dict[str, Tensor]) -> dict[str, Any]:
            with torch.inference_mode(False):
                opened = open_sharded(stored, mesh=lambda: parts.first.groups.mesh, weights_only=plain)
                loaded = checkpoint.load_opened(
                    opened,
                    path=stored.path,
                    model=parts.model,
                    optimizers=list(parts.optimizers.values()),
                    strict=True,
                    rank_state=own,
                    names=parts.names,
                    needed=parts.rest,
                )
                for model in parts.models.values():
                    _reset_after_load(model)
            return {key: value for key, value in loaded.items() if key not in ORIGIN_KEYS}

        remainder: dict[str, Any] | None = self._loop_of(parts).load(fill, weights_only=plain)
        if remainder is None:
            return None
        for key, scaler in self._scaler().items():
            scaler.load_state_dict(remainder.pop(key))
        _move_state_into(source=remainder, destination=state, keys=parts.rest.keys() & remainder.keys())
        return remainder

    def end_in_memory(self: Any) -> None:
        """End the keepers of in-memory checkpoints, when training is done; every rank calls it.

        Without it they end half an hour after the last rank, or with ``python -m lightning_mics keeper stop``.
        """
        if self._in_memory is not None:
            self._in_memory.end()
            self._in_memory = None

    def _loop_of(self: Any, parts: Parts) -> InMemoryLoop:
        if self._in_memory is None:
            self._in_memory = InMemoryLoop(parts.first, local_size=self.num_processes, device=self.root_device)
        loop: InMemoryLoop = self._in_memory
        return loop

    def load_checkpoint(
        self: Any,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint of Fabric or the Trainer into the objects in ``state``, in place; every rank calls it.

        Args:
            path: Path or URL of the checkpoint.
            state: Models, optimizers, and all else, by their keys; or a model alone.
            strict: Whether the checkpoint must have all keys of ``state``.
            weights_only: Whether plain data and tensors only are read; None takes the strategy's option.

        Returns:
            Entries of the checkpoint that ``state`` has no key for.

        Raises:
            KeyError: If ``strict`` and the checkpoint lacks a key of ``state``.
            NotImplementedError: If ``state`` is an optimizer alone.
            ValueError: If ``state`` holds no model that was set up.
        """
        if isinstance(state, Optimizer):
            raise NotImplementedError(
                "an optimizer is loaded with its model: fabric.load(path, {'model': model, 'optimizer': optimizer})"
            )
        self.wait_for_checkpoints()
        shared_path = self._shared_path(path)
        if isinstance(state, nn.Module):
            self._load_raw(shared_path, state, strict=strict, weights_only=weights_only)
            return {}
        parts = Parts.of(state or {}, doing="load")
        assert state is not None
        remainder: dict[str, Any] = self._load(shared_path, parts, strict, weights_only)
        for key, scaler in self._scaler().items():
            if key in remainder and key not in state:
                scaler.load_state_dict(remainder.pop(key))
        _move_state_into(source=remainder, destination=state, keys=parts.rest.keys() & remainder.keys())
        return remainder

    def _scaler(self: Any) -> dict[str, Any]:
        """The gradient scaler by its key in checkpoints, if there is one."""
        scaler = getattr(self.precision, "scaler", None)
        return {} if scaler is None else {SCALER_KEY: scaler}

    def _load(self: Any, path: StoragePath, parts: Parts, strict: bool, weights_only: bool | None) -> dict[str, Any]:
        answered = all_ranks_answer(f"loading {path}", timeout=self._timeout)
        with torch.inference_mode(False), answered, self._together("loads a checkpoint"):
            remainder = checkpoint.load(
                path,
                model=parts.model,
                optimizers=list(parts.optimizers.values()),
                strict=strict,
                weights_only=self._reads_weights_only(weights_only),
                names=parts.names,
                needed=parts.rest if strict else (),
                unset=_without_weights(parts),
            )
            for model in parts.models.values():
                _reset_after_load(model)
        return {key: value for key, value in remainder.items() if key not in ORIGIN_KEYS}

    def _load_raw(self: Any, path: StoragePath, model: nn.Module, *, strict: bool, weights_only: bool | None) -> None:
        """Load the model of a sharded checkpoint, or a file with a ``state_dict`` of FQNs and tensors."""
        if holds_shards(path):
            self._load(path, Parts.of({"model": model}, doing="load_raw"), strict, weights_only)
            return
        checkpoint.load_raw(path, model, strict=strict, weights_only=self._reads_weights_only(weights_only))
        if "_mics" in vars(model):
            _reset_after_load(model)


def _contents(
    parts: Parts, *, full: bool, beside: bool = False, save_frozen: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The states to save of the model, of optimizers by key, and of all else by key; every rank calls it."""
    for model in parts.models.values():
        sharded(model).prepare_to_save(beside=beside)
    states = model_state(parts.model, full=full, save_frozen=save_frozen)
    optimizers = {
        key: optimizer_state(parts.model, optimizer, sharded=not full) for key, optimizer in parts.optimizers.items()
    }
    rest = {key: value.state_dict() if isinstance(value, _Stateful) else value for key, value in parts.rest.items()}
    return states, optimizers, rest


def _without_weights(parts: Parts) -> list[str]:
    """FQNs in :attr:`Parts.model` of the frozen parameters to which nothing has given weights."""
    return list(parts.joined({key: dict.fromkeys(sharded(m).without_weights()) for key, m in parts.models.items()}))


def _reset_after_load(model: nn.Module) -> None:
    """Reshard, verify replicas, and keep the gradients of an open window, unless an error has broken it off."""
    assert isinstance(model, FSDPModule)
    model.reshard()
    schedule = sharded(model).schedule
    if is_in_iteration(model):
        schedule.window.abandon()
    schedule.cache.invalidate()
    verify_replicas(model, sharded(model).groups)
