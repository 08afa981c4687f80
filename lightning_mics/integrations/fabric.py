"""``Fabric(strategy="mics")``: the adapter between Lightning's Fabric and the policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.connector import _Connector
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics._torch.units.use_errors import described_errors
from lightning_mics.integrations._fabric_checkpoints import FabricCheckpoints
from lightning_mics.integrations._lightning import LightningStrategy, reduce_in_place
from lightning_mics.integrations._marked_methods import run_marked_methods_as_forwards
from lightning_mics.integrations._precision import (
    Float16Mixed,
    accept_16_mixed,
    check_precision,
    prepared_scaler,
)
from lightning_mics.policy.out_of_memory import explain_out_of_memory
from lightning_mics.sharding.evaluation import allow_evaluation
from lightning_mics.sharding.modules.copying import prepare_copies, reject_copy
from lightning_mics.sharding.optimizers.offload import shards_stay
from lightning_mics.sharding.optimizers.overflow import check_optimizer, skipped_steps
from lightning_mics.sharding.sharded import sharded


class _ModelParallel(ModelParallelStrategy):
    """Fabric's strategy without the user's ``parallelize_fn``: the policy shards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(parallelize_fn=_not_called, **options)


class MiCSFabricStrategy(LightningStrategy, FabricCheckpoints, _ModelParallel):
    """MiCS for Fabric: sharded training whose constant traffic stays inside partition groups.

    ``fabric.setup`` takes an ordinary module and shards it block by block. Its optimizers are set up in the same call
    or created afterwards. ``fabric.no_backward_sync`` marks the micro-steps before the boundary: gradients are reduced
    inside the partition group in each, over replicas at the boundary.

    A full checkpoint has the keys of the saved state, as one of Fabric on one device. The Trainer loads both kinds, and
    Fabric loads the Trainer's. For the options see the constructor.
    """

    @override
    def _initialize(self) -> None:
        if self._in_memory_checkpoint is not None:
            raise ValueError(
                "in_memory_checkpoint is for a Trainer, which knows when a step ends; in a loop of Fabric call "
                "fabric.strategy.load_from_memory(state) before it, and fabric.strategy.save_in_memory(state) after "
                "each optimizer step"
            )
        self._backward_sync_control = _TwoHop()
        self._models: list[nn.Module] = []  # set up so far
        run_marked_methods_as_forwards(type(self))
        self._ran_forward: list[nn.Module] = []  # those with a forward, with gradients, since the last backward

    # -- before the model --------------------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped for an overflow in ``"16-mixed"``; reading it waits for the device."""
        return skipped_steps(getattr(self.precision, "scaler", None))

    @property
    @override
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None:
            check_precision(precision.precision)
        scaler = prepared_scaler(precision)
        self._precision = Float16Mixed.of(precision, scaler) if scaler else precision

    # -- sharding the model ------------------------------------------------------------------------------------------

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        if "_mics" not in vars(module):
            reject_copy(module)
            vars(module)["_mics"] = self._policy.shard(
                module,
                precision=self.precision.precision,
                device=self.root_device,
                local_size=self.num_processes,
            )
            rank_zero_info(sharded(module).report)
        with shards_stay(module):
            module.to(self.root_device)  # state besides parameters and buffers, such as metrics
        self._policy.check_kept(module, sharded(module))
        self._device_mesh = sharded(module).groups.mesh
        self._control = sharded(module).groups.control
        sharded(module).schedule.window.abandon()
        if not any(module is known for known in self._models):
            allow_evaluation(module)
            prepare_copies(module, self._prepare_copy, without=["forward"])
            sharded(module).schedule.optimizer_hooks.follow_steps()
            module.register_forward_pre_hook(self._note_forward)
            module.register_forward_hook(_explain_forward, always_call=True)  # also where a forward raises
            self._models.append(module)
        return module

    def _prepare_copy(self, module: nn.Module) -> None:
        """Let a copy, which has no wrapper of Fabric, run in the precision that Fabric runs the model in."""
        allow_evaluation(module)
        forward, precision = module.forward, self.precision

        @wraps(forward)
        def forward_in_precision(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = precision.convert_input((args, kwargs))
            with precision.forward_context():
                return precision.convert_output(forward(*args, **kwargs))

        vars(module)["forward"] = forward_in_precision

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard ``module``, and replace its parameters in ``optimizers`` by its shards."""
        names = _names_in_groups(module, optimizers)
        module = self.setup_module(module)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for optimizer, groups in zip(optimizers, names, strict=True):
            check_optimizer(optimizer, self.precision.precision)
            for group, of_group in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [parameters[name] for name in of_group]
            _adopt(module, optimizer)
            sharded(module).schedule.optimizer_hooks.follow_zero_grad(optimizer)
        return module, optimizers, scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        check_optimizer(optimizer, self.precision.precision)
        own = {id(parameter) for model in self._models for parameter in model.parameters()}
        for model in self._models:
            _adopt(model, optimizer)
        foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise ValueError(
                f"{type(optimizer).__name__} holds {len(foreign)} tensors that are not parameters of a model that was "
                "set up, so nothing would reduce their gradients; make it after `model = fabric.setup_module(model)`, "
                "or set up both in one call: `model, optimizer = fabric.setup(model, optimizer)`"
            )
        for model in self._models:
            if sharded(model).schedule.optimizer_hooks.trains_with(optimizer):
                sharded(model).schedule.optimizer_hooks.follow_zero_grad(optimizer)
        return optimizer

    # -- steps -------------------------------------------------------------------------------------------------------

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        for model in self._ran_forward:
            sharded(model).schedule.window.before_backward()
        self._ran_forward = []
        try:
            with described_errors():
                super().backward(tensor, module, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            for model in self._models:
                explain_out_of_memory(error, sharded(model).memory_advice)
            raise

    @override
    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_forward(self, module: nn.Module, _inputs: Any) -> None:
        """List the models of the next backward. See [Note: Hooks on the root, in order]."""
        if torch.is_grad_enabled() and not any(module is known for known in self._ran_forward):
            self._ran_forward.append(module)

    @override
    def all_reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Any:
        """See :func:`~lightning_mics.integrations._lightning.reduce_in_place`."""
        of_all = group in (None, dist.group.WORLD)  # Fabric passes the latter
        with self._together("reduces a value over all ranks") if of_all else nullcontext():
            return reduce_in_place(tensor, group=group, op=reduce_op)


class _TwoHop(_BackwardSyncControl):
    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Run a micro-step before the boundary: gradients are reduced inside the partition group only."""
        return sharded(module).schedule.micro_step(boundary=False) if enabled else nullcontext()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _explain_forward(module: nn.Module, _inputs: Any, _output: Any) -> None:
    explain_out_of_memory(sys.exc_info()[1], sharded(module).memory_advice)


def _names_in_groups(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[list[str]]]:
    """The FQNs of the parameters in each group of each optimizer: [optimizers][groups][parameters].

    Raises:
        ValueError: If a tensor is not a parameter of the module, or an optimizer has stepped already.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        foreign = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
        if foreign:
            raise ValueError(
                f"{kind} holds {foreign} tensors that are not parameters of the model it is set up with, so nothing "
                "would shard them or reduce their gradients"
            )
        if optimizer.state:
            raise ValueError(
                f"{kind} has stepped, so its state belongs to unsharded parameters; set it up before its first step, "
                "and load states with fabric.load"
            )
    return [[[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def _adopt(model: nn.Module, optimizer: Optimizer) -> None:
    if (how := sharded(model).schedule.optimizer_hooks.adopt(optimizer)) is not None:
        rank_zero_info(how)


def _not_called(module: Any, _mesh: Any) -> Any:
    raise AssertionError("the policy shards the model")


accept_16_mixed(
    _Connector, MiCSFabricStrategy, plugin=MixedPrecision, flags=("_precision_input", "_precision_instance")
)
