"""What a Trainer's checkpoints hold, and when they are loaded: in the order in which Lightning loads them elsewhere.

::

    load_checkpoint             opens it: entries are read, with how the model was sharded; tensors are not
    on_load_checkpoint          of the module; it may rename or replace whatever is there
    load_model_state_dict       the model is sharded, as it was if the job is the same, and loaded
    callbacks                   get their states, and their own on_load_checkpoint
    setup                       makes the optimizers
    on_fit_start
    load_optimizer_state_dict
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_mics import checkpoint
from lightning_mics.checkpoint import random_states
from lightning_mics.checkpoint.compare import check_base, check_optimizer_count
from lightning_mics.checkpoint.content.hyperparameters import copies_without_values, to_save
from lightning_mics.checkpoint.content.opened import OpenedCheckpoint
from lightning_mics.checkpoint.content.trained_only import (
    left_out,
    model_state,
    trained_only_entry,
    with_base,
    without_frozen,
)
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.loading import (
    entries_of_open,
    load_model,
    load_optimizers,
    load_rank_state,
    open_to_load,
    read_entries,
    shown_to_hooks,
)
from lightning_mics.checkpoint.opening import open_sharded
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import origin
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.checkpoint.storage.store import CheckpointStore
from lightning_mics.checkpoint.whole_model import CURRENT_MODEL_KEY
from lightning_mics.in_memory.reading import InMemoryCheckpoint
from lightning_mics.integrations._in_memory import StepInMemory
from lightning_mics.integrations.trainer import resuming
from lightning_mics.integrations.trainer.boundary import note_what_follows
from lightning_mics.integrations.trainer.callbacks import is_averaged
from lightning_mics.integrations.trainer.exceptions import WithoutOtherRanks
from lightning_mics.integrations.trainer.in_memory import InMemoryTraining
from lightning_mics.sharding.ranks.replicas import verify_replicas
from lightning_mics.sharding.sharded import Sharded

VERSION = "pytorch-lightning_version"  # in checkpoints of a Trainer; from others it loads model and optimizers

COPIES = "_mics_hyperparameters"  # of a module: what is saved of hyper-parameters that hold parts of it


class SavesAndLoads:
    """Mixin of a Trainer's strategy that saves and loads checkpoints.

    Methods take an untyped ``self``, which has the attributes of Lightning's strategies.
    """

    _in_memory: InMemoryTraining | None = None  # in a fit
    _opened: OpenedCheckpoint | None = None  # from opening a checkpoint until everything in it is loaded
    _resumed: resuming.ResumeState | None = None  # from loading a checkpoint until training starts

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Lightning loads before the optimizers exist, as without sharding."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls :meth:`load_optimizer_state_dict`, after ``on_fit_start``."""
        return True

    # -- saving ------------------------------------------------------------------------------------------------------

    _saves_beside = False  # an in-memory checkpoint is being collected

    def optimizer_state(self: Any, optimizer: Optimizer) -> dict[str, Any]:
        """The state by FQN, sharded; for a full checkpoint unsharded and by number, on rank 0 only."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with WithoutOtherRanks(self._control), self._together("prepares an optimizer's state"):
            return optimizer_state(self.model, inner, sharded=self._save_distributed_checkpoint)
        return {}

    def lightning_module_state_dict(self: Any) -> dict[str, Any]:
        """The state by FQN, sharded; for a full checkpoint unsharded, on rank 0 only."""
        sharded = self._shard_now()
        with WithoutOtherRanks(self._control), self._together("prepares the model's state"):
            sharded.prepare_to_save(beside=self._saves_beside)
            if self._leaves_out_frozen:
                return model_state(self._root(), full=not self._save_distributed_checkpoint, save_frozen=False)
            if self._save_distributed_checkpoint:  # no copy: saving copies this rank's rows only
                return get_model_state_dict(self._root())
            return super().lightning_module_state_dict()  # type: ignore[misc, no-any-return]
        return {}

    @property
    def _leaves_out_frozen(self: Any) -> bool:
        """Whether what is being saved has only what trains; in-memory checkpoints have all."""
        return not self._save_frozen and not self._saves_beside

    def save_checkpoint(self: Any, state: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save what the Trainer has collected; every rank calls it.

        Args:
            state: Content of the checkpoint, which is not changed.
            filepath: Path or URL of the checkpoint.
            storage_options: Rejected, as by Lightning's own strategies for sharded models.
        """
        if storage_options is not None:
            super().save_checkpoint(state, filepath, storage_options)  # type: ignore[misc]  # raises the error
        answered = all_ranks_answer(f"saving {filepath}", timeout=self._timeout)
        not_saved = WithoutOtherRanks(self._control, lost=f"{filepath} was not saved")
        with not_saved, answered, self._together("saves a checkpoint"):
            self._save(self._shared_path(filepath), dict(state))

    def _save(self: Any, path: StoragePath, state: dict[str, Any]) -> None:
        random_state = self._complete(state)
        if self._leaves_out_frozen:
            for key in ("state_dict", CURRENT_MODEL_KEY):  # an average has them too
                if key in state:
                    state[key] = without_frozen(state[key], self._root())
            state.update(trained_only_entry(self._root()))
        if not self._save_distributed_checkpoint:
            state.update(checkpoint.gather_rank_states(random_state) if random_state else {})
            checkpoint.save_whole(
                path, state, write=lambda content, file: self.checkpoint_io.save_checkpoint(content, str(file))
            )
            return
        state.update(origin(self._root(), self.topology, self._state().chosen))
        self._saving.save(
            path,
            model_state=state.pop("state_dict"),
            optimizer_states=state.pop("optimizer_states", []),
            meta=state,
            rank_state=random_state,
            synchronous=not self._in_fit(),
            show_progress=self._shows_progress(),
        )

    def _complete(self: Any, state: dict[str, Any]) -> dict[str, Tensor]:
        """Add to what the Trainer has collected what a run needs to resume exactly; returns this rank's own part."""
        for owner in _with_hyperparameters(self._trainer):
            if type(state.get(owner.CHECKPOINT_HYPER_PARAMS_KEY)) is dict:
                copies = vars(owner).get(COPIES, {})
                state[owner.CHECKPOINT_HYPER_PARAMS_KEY], _ = to_save(state[owner.CHECKPOINT_HYPER_PARAMS_KEY], copies)
        if "loops" in state:
            note_what_follows(state, self._trainer)
        if "optimizer_states" not in state or self._trainer.state.fn is None:
            return {}
        now = self._resumed or resuming.ResumeState.now(self._trainer)  # a run can resume from it
        state[resuming.KEY] = now.plain()
        return now.random_state

    def _collect(self: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of a sharded checkpoint, and this rank's own tensors; every rank calls it."""
        with self._collecting_beside():
            state = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        random_state = self._complete(state)
        state.update(origin(self._root(), self.topology, self._state().chosen))
        return state, random_state

    @contextmanager
    def _collecting_beside(self: Any) -> Iterator[None]:
        """Inside, states are sharded, whatever the kind of checkpoints on a disk, and no rank waits for others."""
        kind, self._save_distributed_checkpoint, self._saves_beside = self._save_distributed_checkpoint, True, True
        try:
            yield
        finally:
            self._save_distributed_checkpoint, self._saves_beside = kind, False

    def _in_fit(self: Any) -> bool:
        """Whether the end of a fit will wait for a save; after the fit users expect a synchronous one."""
        state = self._trainer.state
        return bool(state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING)

    def _shows_progress(self: Any) -> bool:
        """Whether this rank displays progress, as the Trainer's progress bar does."""
        bar = self._trainer.progress_bar_callback
        return bool(self.is_global_zero and bar is not None and getattr(bar, "is_enabled", True))

    # -- loading -----------------------------------------------------------------------------------------------------

    def load_checkpoint(self: Any, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint; its tensors are read when the model and the optimizers are loaded, or used by a hook.

        Args:
            checkpoint_path: Path or URL of the checkpoint.
            weights_only: Whether plain data and tensors only are read; None takes the strategy's option.
        """
        self.wait_for_checkpoints()
        answered = all_ranks_answer(f"loading {checkpoint_path}", timeout=self._timeout)
        with torch.inference_mode(False), answered, self._together("loads a checkpoint"):
            path, plain = self._shared_path(checkpoint_path), self._reads_weights_only(weights_only)
            stored: InMemoryCheckpoint | None = None

            if isinstance(checkpoint_path, StepInMemory):
                assert self._in_memory is not None
                stored = self._in_memory.open(checkpoint_path, weights_only=plain)

            def mesh() -> DeviceMesh:  # an entry is sharded, so the model is sharded before entries are known
                if "_mics" not in vars(self.lightning_module):
                    read = partial(read_entries, path) if stored is None else partial(entries_of_open, stored)
                    entries = read(weights_only=plain)
                    self._opened = OpenedCheckpoint(model={}, optimizers=[], entries=entries)
                sharded: Sharded = self._shard_now()
                return sharded.groups.mesh

            if stored is None:
                opened = open_to_load(path, mesh=mesh, weights_only=plain, show_progress=self._shows_progress())
            else:
                opened = open_sharded(stored, mesh=mesh, weights_only=plain)
            if left_out(opened.entries):
                opened = self._over_base(opened, checkpoint_path)
            if _hooks_look(self._trainer):
                opened = shown_to_hooks(opened)
        self._opened = opened
        loaded = {**opened.entries, "state_dict": opened.model}
        if opened.optimizers or "lr_schedulers" in loaded or VERSION not in loaded:
            loaded["optimizer_states"] = opened.optimizers
        if self._is_set_up:  # nobody else will load it
            self.load_model_state_dict(loaded, strict=self.lightning_module.strict_loading)
            if self._trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in loaded:
                self.load_optimizer_state_dict(loaded)
        return loaded if VERSION in loaded else {VERSION: lightning.__version__, "lr_schedulers": [], **loaded}

    def _over_base(self: Any, opened: OpenedCheckpoint, path: Any) -> OpenedCheckpoint:
        """A checkpoint of what trains, with the base weights that the model has, in its average too."""
        self._opened = opened
        check_base(opened.entries, self._shard_now().without_weights(), path=path)
        own = get_model_state_dict(self._root())
        entries = dict(opened.entries)
        if CURRENT_MODEL_KEY in entries:
            entries[CURRENT_MODEL_KEY] = with_base(entries[CURRENT_MODEL_KEY], own, self._root())
        return replace(opened, model=with_base(opened.model, own, self._root()), entries=entries)

    def load_model_state_dict(self: Any, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the model from an opened checkpoint, whose ``state_dict`` hooks may have changed.

        Args:
            checkpoint: What :meth:`load_checkpoint` has returned.
            strict: Whether the names must be those of the model.
        """
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        opened = self._opened or OpenedCheckpoint(model={}, optimizers=[], entries={})
        sharded, random_state = self._shard_now(), random_states.capture() if fitting else {}
        answered = all_ranks_answer("loading the model", timeout=self._timeout)
        with torch.inference_mode(False), answered, self._together("loads the model"):
            opened.model = dict(checkpoint.get("state_dict", {}))
            load_model(opened, model=self.model, strict=strict)
            load_rank_state(opened, random_state)
            self._abandon_window()
            verify_replicas(self.model, sharded.groups)
            if is_averaged(self._trainer) and isinstance(checkpoint, dict):  # no rank reads more than its own rows
                checkpoint["state_dict"] = copy.deepcopy(get_model_state_dict(self.model))
        if fitting and resuming.KEY in checkpoint:
            self._resumed = resuming.ResumeState(
                geometry=resuming.EpochGeometry(**checkpoint[resuming.KEY]), random_state=random_state
            )

    def load_optimizer_state_dict(self: Any, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers from an opened checkpoint, whose ``optimizer_states`` hooks may have changed.

        Args:
            checkpoint: What :meth:`load_checkpoint` has returned.
        """
        states = list(checkpoint["optimizer_states"])
        opened = self._opened or OpenedCheckpoint(model={}, optimizers=states, entries={})
        check_optimizer_count(self.optimizers, len(states))
        answered = all_ranks_answer("loading the optimizers", timeout=self._timeout)
        with torch.inference_mode(False), answered, self._together("loads the optimizers"):
            load_optimizers(opened, list(zip(self.optimizers, states, strict=False)), model=self.model)
            if self._in_memory is not None:
                self._in_memory.save_again()

    def remove_checkpoint(self: Any, filepath: str | Path) -> None:
        """Remove a checkpoint after pending saves are complete; until then it may be the latest."""
        self._saving.after_saves(lambda: self._remove(storage_path(filepath)))

    def _remove(self: Any, path: StoragePath) -> None:
        if isinstance(path, Path):
            super().remove_checkpoint(path)  # type: ignore[misc]
        elif self.is_global_zero:
            CheckpointStore(path).remove()


def keep_hyperparameters(trainer: pl.Trainer) -> None:
    """Copy networks in hyper-parameters, and warn of what no checkpoint will hold, before the model is sharded.

    Args:
        trainer: The Trainer that is about to run.
    """
    for owner in _with_hyperparameters(trainer):
        vars(owner)[COPIES] = copies_without_values(owner.hparams, trainer.lightning_module)
        dropped = to_save(owner.hparams, vars(owner)[COPIES])[1]
        for name, kind in dropped.items() if trainer.state.fn == TrainerFn.FITTING else ():
            rank_zero_warn(
                f"the hyper-parameter {name!r} of {type(owner).__name__}, a {kind}, cannot be pickled, so checkpoints "
                f"are saved without it: save_hyperparameters(ignore=[{name.partition('.')[0]!r}]) avoids this, and "
                "load_from_checkpoint takes it as an argument"
            )


def _with_hyperparameters(trainer: Any) -> list[Any]:
    return [owner for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]


def _hooks_look(trainer: pl.Trainer) -> bool:
    """Whether a hook of the module or of a callback is shown what a checkpoint holds."""
    module = trainer.lightning_module
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return is_overridden("on_load_checkpoint", module, pl.LightningModule) or any(
        type(callback).on_load_checkpoint is not pl.Callback.on_load_checkpoint for callback in callbacks
    )
