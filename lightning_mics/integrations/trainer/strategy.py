"""``Trainer(strategy="mics")``: the adapter between Lightning's Trainer and the policy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics._torch.fsdp import expect_backward
from lightning_mics._torch.optimizers.steps import call_first_before_step
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.integrations._in_memory import fits_the_ranks
from lightning_mics.integrations._lightning import LightningStrategy, reduce_in_place
from lightning_mics.integrations._precision import accept_16_mixed, check_precision, prepared_scaler
from lightning_mics.integrations.trainer import resuming
from lightning_mics.integrations.trainer.callbacks import (
    announce_averages,
    check_callbacks,
    forget_averages,
    number_of_averages,
    shard_averages,
)
from lightning_mics.integrations.trainer.checkpoints import SavesAndLoads, keep_hyperparameters
from lightning_mics.integrations.trainer.exceptions import (
    agree_on_batches,
    raise_cause,
    tell_of_exception,
)
from lightning_mics.integrations.trainer.in_memory import InMemoryTraining
from lightning_mics.integrations.trainer.logged_numbers import log_whole_numbers
from lightning_mics.integrations.trainer.manual_optimization import unshard_whenever_used
from lightning_mics.integrations.trainer.mixed_precision import BFloat16Mixed, Float16Mixed
from lightning_mics.integrations.trainer.preemption import forget_signals, stop_when_signaled
from lightning_mics.integrations.trainer.steps import StepRedirection, StepsAsForward
from lightning_mics.policy.out_of_memory import explain_out_of_memory
from lightning_mics.sharding.modules.changes import write_changes
from lightning_mics.sharding.optimizers.offload import shards_stay
from lightning_mics.sharding.optimizers.overflow import check_optimizer, skipped_steps
from lightning_mics.sharding.sharded import Sharded
from lightning_mics.topology import Topology


class MiCSStrategy(LightningStrategy, StepsAsForward, SavesAndLoads, ModelParallelStrategy):
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
        self._is_set_up = False  # for the run that has started

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
        scaler = prepared_scaler(precision_plugin)
        if type(precision_plugin) is MixedPrecision:
            device = precision_plugin.device
            precision_plugin = Float16Mixed(device=device, scaler=scaler) if scaler else BFloat16Mixed(device=device)
        self._precision_plugin = precision_plugin

    def _set_world_ranks(self) -> None:
        self.set_world_ranks()

    @override
    def setup_environment(self) -> None:
        self._is_set_up, self._opened, self._resumed = False, None, None
        super().setup_environment()
        announce_averages(self._trainer)
        if self._in_memory_checkpoint is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._in_memory = InMemoryTraining(
                self._trainer,
                every=self._in_memory_checkpoint,
                local_size=self.num_processes,
                collect=self._collect,
            )

    @override
    def _check_before_communicating(self) -> None:
        with nullcontext() if self._in_memory_checkpoint is None else fits_the_ranks():
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
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # tensors made in inference mode cannot be used in training
        with torch.inference_mode(False):
            self._shard_now()
            self._control = self._state().groups.control
            with shards_stay(module):
                self.model_to_device()  # metrics, and the module's own `device`
            self._policy.check_kept(module, self._state())
            module._device_mesh = self._device_mesh = self._state().groups.mesh
            self._abandon_window()
            if fitting:
                self.setup_optimizers(trainer)
            self.setup_precision_plugin()
            if fitting and not self._policy.offload:
                _optimizers_to_device(self.optimizers, self.root_device)
        self._is_set_up = True
        control = self._state().groups.control
        if self._in_memory is not None:
            self._in_memory.begin(self.topology, device=self.root_device)
        stop_when_signaled(
            trainer,
            begin_max=control.begin_largest,
            wait_for_checkpoints=self.wait_for_checkpoints,
            beside=self._in_memory,
        )
        agree_on_batches(trainer, control)

    def _shard_now(self) -> Sharded:
        """Shard the module unless it is sharded already; a checkpoint may need that before :meth:`setup`."""
        trainer, module = self._trainer, self.lightning_module
        assert self.accelerator is not None and module is not None
        if "_mics" not in vars(module):
            self.accelerator.setup(trainer)
            keep_hyperparameters(trainer)
            with torch.inference_mode(False):
                vars(module)["_mics"] = self._shard(module, fitting=trainer.state.fn == TrainerFn.FITTING)
        self.model, self._sharded = module, vars(module)["_mics"]
        shard_averages(trainer, prepare=self._prepare_exchange)
        return self._state()

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
            micro_steps=self._trainer.accumulate_grad_batches if module.automatic_optimization else None,
            resumed=self._opened.entries if fitting and self._opened is not None else {},
            averages=number_of_averages(self._trainer) if fitting else 0,
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
            check_optimizer(optimizer, self.precision_plugin.precision)
            if (how := self._state().schedule.optimizer_hooks.adopt(optimizer)) is not None:
                rank_zero_info(how)
            if self._in_memory is not None:
                call_first_before_step(optimizer, self._in_memory.before_optimizer_step)
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
        if self._in_memory is not None:
            self._in_memory.confirm()

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self._state().schedule.window.after_backward()
        if self._in_memory is not None:
            self._in_memory.confirm()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext(closure) if self._in_memory is None else self._in_memory.beside(closure) as run:
            output = super().optimizer_step(optimizer, run, *args, **kwargs)
        self._reshard_root()  # if no backward did: the next use must gather the new weights
        if self._shows_weights:  # to the hooks after the step, which expect them as the step has left them
            self._root().unshard()
            self._reshard_root()
        return output

    @override
    def on_train_start(self) -> None:
        resumed, self._resumed, self._opened = self._resumed, None, None
        if resumed is not None:
            resuming.resume(self._trainer, resumed)

    @override
    def on_train_end(self) -> None:
        schedule = self._state().schedule
        schedule.cache.check_arrived(wait=True)
        if schedule.replicas is not None:
            schedule.replicas.read()
        self._state().groups.control.agree("ends training")
        if self.skipped_steps:
            rank_zero_info(f"{self.skipped_steps} optimizer steps were skipped, as gradients overflowed in float16")
        self._abandon_window()
        self.wait_for_checkpoints()
        self._end_in_memory(finished=True)

    @override
    def teardown(self) -> None:
        if self.lightning_module is not None:
            forget_signals(self._trainer)
            forget_averages(self._trainer)
        self._end_in_memory(finished=False)
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        tell_of_exception(self._trainer, self._control)
        self._end_in_memory(finished=False)
        if self._sharded is not None:
            explain_out_of_memory(exception, self._sharded.memory_advice)
        self._abandon_window()
        try:
            self.wait_for_checkpoints()
        except (RuntimeError, OSError) as error:  # the exception is what users should see first
            rank_zero_warn(str(error))
        raise_cause(exception, self._control)

    def _end_in_memory(self, *, finished: bool) -> None:
        in_memory, self._in_memory = self._in_memory, None
        if in_memory is not None:
            in_memory.close(finished=finished)

    def _reshard_root(self) -> None:
        """Reshard the root, which FSDP2 leaves unsharded after a forward, for the backward that follows in training."""
        self._root().reshard()
        self._state().schedule.units.reshard()

    def _prepare_exchange(self) -> None:
        """Show shards, and let the in-memory checkpoint that is being copied have them as the step has left them."""
        self._reshard_root()
        if self._in_memory is not None:
            self._in_memory.before_optimizer_step()

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
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped for an overflow in ``"16-mixed"``; reading it waits for the device."""
        return skipped_steps(getattr(self.precision_plugin, "scaler", None))

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


accept_16_mixed(
    _AcceleratorConnector, MiCSStrategy, plugin=MixedPrecision, flags=("_precision_flag", "_precision_plugin_flag")
)
