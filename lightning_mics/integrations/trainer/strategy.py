"""``Trainer(strategy="mics")``: the adapter between Lightning's Trainer and the policy."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics import checkpoint
from lightning_mics._torch.fsdp import expect_backward
from lightning_mics.checkpoint import random_states
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import origin
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.checkpoint.storage.store import CheckpointStore
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.integrations._lightning import LightningStrategy, check_precision, reduce_in_place
from lightning_mics.integrations.trainer import resuming
from lightning_mics.integrations.trainer.callbacks import check_callbacks
from lightning_mics.integrations.trainer.exceptions import (
    WithoutOtherRanks,
    agree_on_batches,
    raise_cause,
    tell_of_exception,
)
from lightning_mics.integrations.trainer.logged_numbers import log_whole_numbers
from lightning_mics.integrations.trainer.manual_optimization import unshard_whenever_used
from lightning_mics.integrations.trainer.mixed_precision import BFloat16Mixed
from lightning_mics.integrations.trainer.preemption import forget_signals, stop_when_signaled
from lightning_mics.integrations.trainer.steps import StepRedirection, StepsAsForward
from lightning_mics.sharding.initialization import verify_replicas
from lightning_mics.sharding.modules.changes import write_changes
from lightning_mics.sharding.sharded import Sharded
from lightning_mics.topology import Topology

VERSION = "pytorch-lightning_version"  # in checkpoints of a Trainer; from others it loads model and optimizers


class MiCSStrategy(LightningStrategy, StepsAsForward, ModelParallelStrategy):
    """MiCS: sharded training whose constant traffic stays inside partition groups.

    Takes an ordinary LightningModule, with or without ``configure_model``, and shards it block by block at the start of
    ``fit``, ``validate``, ``test`` or ``predict``.

    For the options see the constructor.
    """

    @override
    def _initialize(self) -> None:
        self._forward_redirection = StepRedirection()
        self._sharded: Sharded | None = None
        self._evaluation = ExitStack()
        self._shows_weights = False  # whether the last training step returned a parameter, or a view of one
        self._resumed: resuming.ResumeState | None = None  # from loading a checkpoint until training starts

    # -- before the model --------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Lightning injects a distributed sampler."""
        return True

    @property
    def topology(self) -> Topology:
        """Positions of all ranks; available once the model is sharded."""
        return self._state().groups.topology

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None:
            check_precision(precision_plugin.precision)
        if type(precision_plugin) is MixedPrecision:
            precision_plugin = BFloat16Mixed(device=precision_plugin.device)
        self._precision_plugin = precision_plugin

    def _set_world_ranks(self) -> None:
        self.set_world_ranks()

    @override
    def _check_before_communicating(self) -> None:
        super()._check_before_communicating()
        check_callbacks(self._trainer)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """Build on the CPU, or on the meta device if ``empty_init``: a GPU never holds an unsharded model."""
        device = torch.device("meta" if empty_init else "cpu")
        with device, self.precision_plugin.tensor_init_context():
            yield

    # -- sharding the model ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert self.accelerator is not None and module is not None
        self._resumed = None
        self.accelerator.setup(trainer)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # tensors made in inference mode cannot be used in training
        with torch.inference_mode(False):
            if "_mics" not in vars(module):
                vars(module)["_mics"] = self._shard(module, fitting=fitting)
            self.model, self._sharded = module, vars(module)["_mics"]
            self._control = self._state().groups.control
            self.model_to_device()  # metrics, and the module's own `device`
            self._policy.check_kept(module, self._state())
            module._device_mesh = self._device_mesh = self._state().groups.mesh
            self._abandon_window()
            if fitting:
                self.setup_optimizers(trainer)
            self.setup_precision_plugin()
            if fitting:
                _optimizers_to_device(self.optimizers, self.root_device)
        control = self._state().groups.control
        stop_when_signaled(trainer, reduce_max=control.largest, wait_for_checkpoints=self.wait_for_checkpoints)
        agree_on_batches(trainer, control)

    def _shard(self, module: nn.Module, *, fitting: bool) -> Sharded:
        if fitting and self._layer_sync is not None:
            module = self._layer_sync.apply(module)
        module = self.precision_plugin.convert_module(module)
        sharded = self._policy.shard(
            module,
            precision=self.precision_plugin.precision,
            device=self.root_device,
            local_size=self.num_processes,
            training=fitting,
        )
        if not module.automatic_optimization:
            unshard_whenever_used(module, sharded.blocks)
        log_whole_numbers(module)
        rank_zero_info(sharded.report)
        return sharded

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.model is not None
        sharded = set(self.model.parameters())
        for index, optimizer in enumerate(self.optimizers):
            self._state().schedule.optimizer_hooks.adopt(optimizer)
            foreign = [p for group in optimizer.param_groups for p in group["params"] if p not in sharded]
            if foreign:
                raise ValueError(
                    f"optimizer {index} ({type(optimizer).__name__}) holds {len(foreign)} tensors that are not "
                    "parameters of the sharded model, so nothing would reduce their gradients; make it in "
                    "`configure_optimizers` from `self.parameters()`"
                )

    # -- steps -------------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Run a micro-step before the boundary; Lightning also enters it for ``toggle_model(sync_grad=False)``."""
        with self._state().schedule.micro_step(boundary=False):
            yield

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        write_changes(self._root())
        self._state().schedule.window.before_backward()
        if not self._root().automatic_optimization:
            expect_backward(self._root(), closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self._state().schedule.window.after_backward()

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        self._reshard_root()  # if no backward did: the next use must gather the new weights
        if self._shows_weights:  # to the hooks after the step, which expect them as the step has left them
            self._root().unshard()
            self._reshard_root()
        return output

    @override
    def on_train_start(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resuming.resume(self._trainer, resumed)

    @override
    def on_train_end(self) -> None:
        self._state().groups.control.agree("ends training")
        self._abandon_window()
        self.wait_for_checkpoints()

    @override
    def teardown(self) -> None:
        if self.lightning_module is not None:
            forget_signals(self._trainer)
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        tell_of_exception(self._trainer, self._control)
        self._abandon_window()
        try:
            self.wait_for_checkpoints()
        except (RuntimeError, OSError) as error:  # the exception is what users should see first
            rank_zero_warn(str(error))
        raise_cause(exception, self._control)

    def _reshard_root(self) -> None:
        """Reshard the root, which FSDP2 leaves unsharded after a forward, for the backward that follows in training."""
        self._root().reshard()
        self._state().schedule.units.reshard()

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _root(self) -> Any:
        return self.lightning_module  # FSDP2 has made it an FSDPModule as well

    def _abandon_window(self) -> None:
        if self._sharded is not None:
            self._sharded.schedule.window.abandon()
            self._evaluation.close()

    def invalidate_cache(self) -> None:
        """Drop cached parameters after weights were changed in a way that torch does not record; every rank calls it.

        Needed inside an accumulation window or an evaluation only. See [Note: When cached weights are dropped].
        """
        self._state().schedule.invalidate_cache()

    @property
    def traffic(self) -> Traffic:
        """Counter of what this rank's collectives have sent; available once the model is sharded."""
        return self._state().schedule.traffic

    @property
    def start_report(self) -> str:
        """The table that rank 0 logged when the model was sharded: groups, techniques, memory."""
        return self._state().report

    def _state(self) -> Sharded:
        if self._sharded is None:
            raise RuntimeError("the model is sharded when the Trainer runs; it has no groups and no schedule before")
        return self._sharded

    @override
    def _together(self, entry: str) -> AbstractContextManager[None]:
        if self._control is not None:
            tell_of_exception(self._trainer, self._control)
        return super()._together(entry)

    # -- reductions --------------------------------------------------------------------------------------------------

    @override
    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """See :func:`~lightning_mics.integrations._lightning.reduce_in_place`."""
        with self._together("reduces a value over all ranks") if group is None else nullcontext():
            return reduce_in_place(tensor, group=group, op=reduce_op)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state by FQN, sharded; for a full checkpoint unsharded and by number, on rank 0 only."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with WithoutOtherRanks(self._control), self._together("prepares an optimizer's state"):
            return optimizer_state(self.model, inner, sharded=self._save_distributed_checkpoint)
        return {}

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        with WithoutOtherRanks(self._control), self._together("prepares the model's state"):
            self._state().schedule.buffers.make_equal()
            if self._save_distributed_checkpoint:  # no copy: saving copies this rank's rows only
                return get_model_state_dict(self._root())
            return super().lightning_module_state_dict()
        return {}

    @override
    def save_checkpoint(self, state: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            super().save_checkpoint(state, filepath, storage_options)  # raises the error
        answered = all_ranks_answer(f"saving {filepath}", timeout=self._timeout)
        with (
            WithoutOtherRanks(self._control, lost=f"{filepath} was not saved"),
            answered,
            self._together("saves a checkpoint"),
        ):
            self._save(self._shared_path(filepath), state)

    def _save(self, path: StoragePath, state: dict[str, Any]) -> None:
        random_state: dict[str, Tensor] = {}
        if "optimizer_states" in state:  # not weights only: a run can resume from it
            now = self._resumed or resuming.ResumeState.now(self._trainer)
            state[resuming.KEY], random_state = now.plain(), now.random_state
        if not self._save_distributed_checkpoint:
            state.update(checkpoint.gather_rank_states(random_state) if random_state else {})
            checkpoint.save_full(path, write=lambda file: self.checkpoint_io.save_checkpoint(state, str(file)))
            return
        state.update(origin(self._root(), self.topology))
        self._saving.save(
            path,
            model_state=state.pop("state_dict"),
            optimizer_states=state.pop("optimizer_states", []),
            meta=state,
            rank_state=random_state,
            synchronous=not self._in_fit(),
            show_progress=self._shows_progress(),
        )

    def _in_fit(self) -> bool:
        """Whether the end of a fit will wait for a save; after the fit users expect a synchronous one."""
        state = self._trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def _shows_progress(self) -> bool:
        """Whether this rank displays progress, as the Trainer's progress bar does."""
        bar = self._trainer.progress_bar_callback
        return self.is_global_zero and bar is not None and getattr(bar, "is_enabled", True)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the model, and in a fit its optimizers, in place; return the rest to the Trainer."""
        assert self.model is not None and self.lightning_module is not None
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        self.wait_for_checkpoints()
        random_state = random_states.capture() if fitting else {}
        answered = all_ranks_answer(f"loading {checkpoint_path}", timeout=self._timeout)
        with torch.inference_mode(False), answered, self._together("loads a checkpoint"):
            meta = checkpoint.load(
                self._shared_path(checkpoint_path),
                model=self.model,
                optimizers=self.optimizers if fitting else [],
                strict=self.lightning_module.strict_loading,
                weights_only=self._reads_weights_only(weights_only),
                rank_state=random_state,
                show_progress=self._shows_progress(),
            )
            self._abandon_window()
            verify_replicas(self.model, self._state().groups)
        if fitting and resuming.KEY in meta:
            self._resumed = resuming.ResumeState(
                geometry=resuming.EpochGeometry(**meta[resuming.KEY]), random_state=random_state
            )
        return meta if VERSION in meta else {VERSION: lightning.__version__, "lr_schedulers": [], **meta}

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint after pending saves are complete; until then it may be the latest."""
        self._saving.after_saves(lambda: self._remove(storage_path(filepath)))

    def _remove(self, path: StoragePath) -> None:
        if isinstance(path, Path):
            super().remove_checkpoint(path)
        elif self.is_global_zero:
            CheckpointStore(path).remove()
