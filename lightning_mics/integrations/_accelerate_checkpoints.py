"""Checkpoints of Accelerate beside its own: on a disk as the Trainer's and Fabric's, and in the memory of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import get_int_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics import checkpoint
from lightning_mics.checkpoint.content.trained_only import model_state, trained_only_entry
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.opening import open_sharded
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import origin
from lightning_mics.checkpoint.storage.path import storage_path
from lightning_mics.in_memory.reading import InMemoryCheckpoint
from lightning_mics.integrations._in_memory import InMemoryLoop
from lightning_mics.sharding.optimizers.overflow import SCALER_KEY
from lightning_mics.sharding.ranks.replicas import verify_replicas
from lightning_mics.sharding.sharded import sharded

LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


class PluginCheckpoints:
    """What :class:`~lightning_mics.MiCSPlugin` saves and loads."""

    _timeout: timedelta | None
    _in_memory: InMemoryLoop | None
    _save_frozen: bool

    def save_checkpoint(self, accelerator: Accelerator, path: str | Path, **state: Any) -> None:
        """Save the model and optimizers as the Trainer and Fabric do; every rank calls it.

        Args:
            accelerator: The Accelerator that has prepared the model and its optimizers.
            path: A directory, or a URL that fsspec has a driver for; the same on all ranks.
            state: Plain data and tensors to save with them; :meth:`load_checkpoint` returns them.

        Raises:
            OSError: On all ranks, if storage fails on one; an earlier checkpoint at ``path`` is unchanged.
            SilentRankError: If a rank does not take part within the timeout.
            ValueError: If no model was prepared with a :class:`MiCSPlugin`.
        """
        with all_ranks_answer(f"saving {path}", timeout=self._timeout):
            checkpoint.save_sharded(storage_path(path), **_states(accelerator, state, save_frozen=self._save_frozen))

    def load_checkpoint(
        self, accelerator: Accelerator, path: str | Path, *, weights_only: bool = True
    ) -> Mapping[str, Any]:
        """Load a checkpoint of :meth:`save_checkpoint`, the Trainer or Fabric, in place; every rank calls it.

        It may have been saved by any number of ranks with any partition size.

        Args:
            accelerator: The Accelerator that has prepared the model and its optimizers.
            path: The directory or full file of the checkpoint, or its URL; the same on all ranks.
            weights_only: Whether to read plain data and tensors only. False unpickles any object, which may run code.

        Returns:
            The content that is neither model nor optimizer.

        Raises:
            ValueError: If no model was prepared with a :class:`MiCSPlugin`, or ``path`` is no checkpoint.
            RuntimeError: If the checkpoint is of another model or other optimizers.
        """
        model = _prepared_model(accelerator)
        sharded(model).schedule.window.abandon()
        with all_ranks_answer(f"loading {path}", timeout=self._timeout):
            rest = checkpoint.load(
                storage_path(path),
                model=model,
                optimizers=optimizers_of(accelerator),
                strict=True,
                weights_only=weights_only,
                unset=sharded(model).without_weights(),
            )
        verify_replicas(model, sharded(model).groups)
        return _without_scaler(accelerator, rest)

    def save_in_memory(self, accelerator: Accelerator, **state: Any) -> None:
        """Save an optimizer step that has just ended in the memory of two nodes; every rank calls it.

        It is copied beside what follows. Call :meth:`load_from_memory` before the loop.

        Args:
            accelerator: The Accelerator that has prepared the model and its optimizers.
            state: Plain data and tensors to save with them, rank 0's; :meth:`load_from_memory` returns them.

        Raises:
            RuntimeError: If a step of before was not loaded.
            HostMemoryError: On all ranks, if the hosts have too little memory; at the first save.
            ValueError: If no model was prepared with a :class:`MiCSPlugin`.
        """
        loop = self._loop_of(accelerator)
        loop.save(**_states(accelerator, state, beside=True), optimizers=optimizers_of(accelerator))

    def load_from_memory(self, accelerator: Accelerator, *, weights_only: bool = True) -> Mapping[str, Any] | None:
        """Resume from the newest step in the nodes' memory, if the job was started again; every rank calls it, once.

        Args:
            accelerator: The Accelerator that has prepared the model and its optimizers.
            weights_only: Whether to read plain data and tensors only.

        Returns:
            What was saved besides the model and the optimizers; None if the job begins anew.

        Raises:
            NoWholeStepError: On all ranks, if the job was started again and no step is whole. The newest checkpoint of
                a disk may be loaded then.
            ValueError: If no model was prepared with a :class:`MiCSPlugin`.
        """
        model = _prepared_model(accelerator)

        def fill(stored: InMemoryCheckpoint, own: dict[str, Tensor]) -> Mapping[str, Any]:
            sharded(model).schedule.window.abandon()
            opened = open_sharded(stored, mesh=lambda: sharded(model).groups.mesh, weights_only=weights_only)
            loaded = checkpoint.load_opened(
                opened,
                path=stored.path,
                model=model,
                optimizers=optimizers_of(accelerator),
                strict=True,
                rank_state=own,
            )
            verify_replicas(model, sharded(model).groups)
            return loaded

        rest = self._loop_of(accelerator).load(fill, weights_only=weights_only)
        return None if rest is None else _without_scaler(accelerator, rest)

    def end_in_memory(self) -> None:
        """End the keepers of in-memory checkpoints, when training is done; every rank calls it."""
        if self._in_memory is not None:
            self._in_memory.end()
            self._in_memory = None

    def _loop_of(self, accelerator: Accelerator) -> InMemoryLoop:
        if self._in_memory is None:
            handle = sharded(_prepared_model(accelerator))
            self._in_memory = InMemoryLoop(handle, local_size=ranks_on_this_host(), device=accelerator.device)
        return self._in_memory


def ranks_on_this_host() -> int:
    """Number of ranks on each host, as launchers say it; without a launcher all are on this one."""
    local_size: int = get_int_from_env(LOCAL_SIZE, dist.get_world_size())
    return local_size


def _states(
    accelerator: Accelerator, state: dict[str, Any], *, beside: bool = False, save_frozen: bool = True
) -> dict[str, Any]:
    """What is saved of the model, the optimizers and ``state``, perhaps beside the training; every rank calls it."""
    model = _prepared_model(accelerator)
    handle = sharded(model)
    handle.prepare_to_save(beside=beside)
    return {
        "model_state": model_state(model, full=False, save_frozen=save_frozen),
        "optimizer_states": [optimizer_state(model, each, sharded=True) for each in optimizers_of(accelerator)],
        "meta": {
            **_scaler_state(accelerator),
            **state,
            **({} if save_frozen else trained_only_entry(model)),
            **origin(model, handle.groups.topology, handle.chosen),
        },
    }


def _prepared_model(accelerator: Accelerator) -> nn.Module:
    models = [model for model in accelerator._models if "_mics" in vars(model)]
    if len(models) != 1:
        raise ValueError(
            f"the Accelerator has prepared {len(models)} models with a MiCSPlugin, and a checkpoint holds exactly one: "
            "call `model, optimizer = accelerator.prepare(model, optimizer)` first, for one model"
        )
    model: nn.Module = models[0]
    return model


def _scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    return {} if accelerator.scaler is None else {SCALER_KEY: accelerator.scaler.state_dict()}


def _without_scaler(accelerator: Accelerator, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Load the gradient scaler, if there is one, and return all else."""
    if accelerator.scaler is None or SCALER_KEY not in loaded:
        return loaded
    accelerator.scaler.load_state_dict(loaded[SCALER_KEY])
    return {key: value for key, value in loaded.items() if key != SCALER_KEY}


def optimizers_of(accelerator: Accelerator) -> list[Optimizer]:
    """The optimizers that an Accelerator has prepared, unwrapped."""
    return [wrapped.optimizer for wrapped in accelerator._optimizers]
