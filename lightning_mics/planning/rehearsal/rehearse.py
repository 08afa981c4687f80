"""A rehearsal runs one rank of a job in one process, to record its collectives and memory without formulas.

The model is sharded by the real ``shard_model``, trained by the real schedule and stepped by the real optimizer, but
the other ranks do not exist (torch's fake process group), and tensors have shapes but no values. So a rank of a job of
any size runs within seconds, and every collective and allocation is counted. One optimizer step runs, on what the step
before it leaves behind: buffers of unsharded parameters, gradients and optimizer states. All trainable parameters have
these, also one that the loss does not use. The memory of sums of gradients, which stays from one step to the next, is
there in the forward that follows.

All micro-steps between the first and the boundary do the same, so only one of them runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_mics._torch.fake import FakeTensorMode, moving_modules, rehearsed_job, tree_map_only
from lightning_mics._torch.fsdp import fsdp_modules, partial_sums, sharded_parameters, unsharded_parameters
from lightning_mics._torch.host_memory import on_host as allocating_on_host
from lightning_mics._torch.units.on_host import copy_gradients, shards_on_host
from lightning_mics.collectives.traffic import Sent
from lightning_mics.cost.collective import Collective
from lightning_mics.planning.rehearsal.activations import default_dtype
from lightning_mics.planning.rehearsal.allocations import GATHERED, ON_HOST, UNKNOWN, Allocations
from lightning_mics.planning.rehearsal.collectives import Collectives
from lightning_mics.planning.rehearsal.observed import WithoutValues, naming_values
from lightning_mics.sharding.blocks import ModuleClasses
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.sharding.optimizers.overflow import find_overflow
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.sharding.shard_model import autocast_dtype, mixed_precision_policy, shard_model
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology

PARAMETERS, GRADIENTS, STATES = "parameters", "gradients", "optimizer states"


CACHED, REDUCING = "cached until the boundary", "gradients being reduced"


CATEGORIES = (PARAMETERS, GRADIENTS, STATES, CACHED, GATHERED, REDUCING, UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class ExecutedCollective:
    """One collective of the rehearsed step.

    Attributes:
        micro_step: Number of the micro-step, from 1; 0 is after the last, for clipping and the update of weights.
        times: Number of micro-steps that this one stands for.
        collective: The collective.
    """

    micro_step: int
    times: int
    collective: Collective


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Collectives and memory of one rank in one optimizer step.

    Attributes:
        topology: Topology of the job.
        rank: The rehearsed rank.
        micro_steps: Micro-steps per optimizer step.
        ran: Collectives of the rank, in order.
        peak: Bytes by category at the peak of the total, in the order of ``CATEGORIES``.
        states: Bytes of parameters, gradients and optimizer states at the end of the last backward, on the device.
        on_host_bytes: Bytes of model states in host memory at the end of the step.
    """

    topology: Topology
    rank: int
    micro_steps: int
    ran: tuple[ExecutedCollective, ...]
    peak: dict[str, int]
    states: dict[str, int]
    on_host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors that this rank holds on its device at any moment of the step."""
        return sum(self.peak.values())

    def sent(self) -> dict[str, Sent]:
        """Bytes that this rank sends per step, by kind of collective and group, as in "all_gather in rail"."""
        totals: dict[str, Sent] = {}
        for ran in self.ran:
            name = f"{ran.collective.kind} in {ran.collective.group}"
            once = ran.collective.sent
            times = Sent(once.inside_bytes * ran.times, once.between_bytes * ran.times)
            totals[name] = totals.get(name, Sent()) + times
        return totals


def rehearse(
    make_model: Callable[[], nn.Module],
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    topology: Topology,
    rank: int = 0,
    micro_steps: int = 1,
    make_optimizer: Callable[[nn.Module], Optimizer] | None = None,
    gradient_clip_val: float | None = None,
    precision: str = "32-true",
    backend: Literal["nccl", "gloo"] = "nccl",
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    block_classes: ModuleClasses | None = None,
    reduce_dtype: torch.dtype | None = None,
    activation_checkpointing: bool | float | ModuleClasses = False,
    activation_offload: bool = False,
    offload: Offload = False,
    averages: int = 0,
) -> Rehearsal:
    """Run one optimizer step of one rank of a job of any size, without its machines and without allocating tensors.

    Only training runs: no data loading, no callbacks, no ``torch.compile``. Autocast is the CPU's.

    Args:
        make_model: Function that builds the model. It is called under fake tensors, so the model may have any size.
        batch: Micro-batch of one rank: tensors in any nest of lists and dictionaries; only shapes matter.
        loss: Function of model and batch that returns the loss, a scalar.
        topology: Topology of the job.
        rank: Rank to rehearse.
        micro_steps: Micro-steps per optimizer step.
        make_optimizer: Function from the sharded model to its optimizer; None is fused AdamW.
        gradient_clip_val: Largest 2-norm of all gradients; None does not clip.
        precision: ``"32-true"``, ``"bf16-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        backend: Backend of the collectives; gloo replaces some collectives of nccl by others.
        communication: Options of the collectives, without "auto".
        block_classes: Classes of the blocks; see :func:`~lightning_mics.sharding.blocks.find_blocks`.
        reduce_dtype: Dtype in which gradients are reduced; None follows the precision.
        activation_checkpointing: Whether blocks are recomputed in backward, or which; see :func:`shard_model`.
        activation_offload: Whether inputs of recomputed blocks are in host memory.
        offload: Which model states are in host memory; see :mod:`~lightning_mics.sharding.optimizers.offload`.
        averages: Number of averages of the weights that are kept: sharded copies of the model.

    Raises:
        RuntimeError: If ``torch.distributed`` is in use.
        TypeError: If the model cannot be sharded.
        ValueError: If a number is not positive, an option does not fit the model or the topology, or shapes in the
            model depend on values.
    """
    if micro_steps < 1:
        raise ValueError(f"micro_steps={micro_steps} must be at least 1")
    if not 0 <= rank < topology.world_size:
        raise ValueError(f"rank={rank} is not one of the {topology.world_size} ranks of the job")
    with rehearsed_job(world_size=topology.world_size, rank=rank):
        groups = create_partition_groups(
            topology,
            device_type="cpu",
            hierarchical=communication.hierarchical,
            caches_on_nodes=communication.caches_on_nodes,
        )
        groups = replace(groups, backend=backend)  # the backend of the job; this process has torch's fake backend
        watch = _Watch(topology, gloo=backend == "gloo")
        with naming_values(), watch.entered() as fake:

            def sharded() -> tuple[nn.Module, AccumulationSchedule]:
                with default_dtype(torch.bfloat16 if precision == "bf16-true" else torch.float32), moving_modules():
                    model = make_model()
                schedule = shard_model(
                    model,
                    groups,
                    communication=communication,
                    block_classes=block_classes,
                    activation_checkpointing=activation_checkpointing,
                    activation_offload=activation_offload,
                    offload=offload,
                    mixed_precision=mixed_precision_policy(precision, reduce_dtype=reduce_dtype),
                )
                return model, schedule

            model, schedule = sharded()
            kept = [sharded()[0] for _ in range(averages)]
            optimizer = (make_optimizer or partial(_adamw))(model)
            batch = tree_map_only(Tensor, fake.from_tensor, batch)
            watch.model(model, schedule, optimizer, averages=kept)
            computed = autocast_dtype(precision)

            def forward() -> Tensor:
                with torch.autocast("cpu", computed, enabled=computed is not None):
                    return loss(model, batch)

            where_shards_are: Any = allocating_on_host if offload is True else nullcontext

            def update() -> None:
                with where_shards_are():
                    _clip_and_step(model, optimizer, gradient_clip_val)

            for unit in fsdp_modules(model).values():
                unit.unshard()
                unit.reshard()
            with where_shards_are():
                _make_gradients(model)
            update()
            watch.claim()
            watch.begin()
            _optimizer_step(
                forward,
                optimizer,
                schedule,
                _stand_for(micro_steps),
                watch=watch,
                update=update,
                scaled=precision == "16-mixed",
            )
            ran, on_host_bytes = tuple(watch.ran), watch.on_host_bytes
            if schedule.window.tensors():
                with schedule.micro_step(boundary=False):
                    forward()  # of the next step, beside gradients of this one and the memory of its sums
    return Rehearsal(
        topology=topology,
        rank=rank,
        micro_steps=micro_steps,
        ran=ran,
        peak={name: watch.peak[name] for name in CATEGORIES if watch.peak.get(name)},
        states=watch.states,
        on_host_bytes=on_host_bytes,
    )


def _stand_for(micro_steps: int) -> dict[int, int]:
    """Micro-steps that run, with the number of micro-steps that each stands for; the last is the boundary."""
    return {
        step: max(1, micro_steps - 2) if step == 2 < micro_steps else 1
        for step in {1, min(2, micro_steps), micro_steps}
    }


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), fused=True)


def _make_gradients(model: nn.Module) -> None:
    """Allocate what is there before a first step, without its forward and backward.

    The step that follows clips gradients although they are zero: DTensor runs each new operation on tensors of the
    unsharded shapes first, to learn those of the result, and the peak must not count them.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _clip_and_step(model: nn.Module, optimizer: Optimizer, gradient_clip_val: float | None) -> None:
    if gradient_clip_val is not None:
        nn.utils.clip_grad_norm_(model.parameters(), gradient_clip_val)
    optimizer.step()


def _optimizer_step(
    forward: Callable[[], Tensor],
    optimizer: Optimizer,
    schedule: AccumulationSchedule,
    micro_steps: Mapping[int, int],
    *,
    watch: _Watch,
    update: Callable[[], None],
    scaled: bool,
) -> None:
    """Like Lightning: gradients of the previous step are freed after the first forward."""
    for micro_step, times in sorted(micro_steps.items()):
        watch.now(micro_step, times)
        with schedule.micro_step(boundary=micro_step == max(micro_steps)):
            loss = forward()
            if micro_step == 1:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            watch.claim()
        watch.claim()
    watch.now(0, 1)
    if scaled:
        find_overflow(torch.zeros(()))
    update()
    watch.claim()


class _Watch:
    """Records the collectives and memory of the rehearsed rank."""

    def __init__(self, topology: Topology, *, gloo: bool) -> None:
        self.ran: list[ExecutedCollective] = []
        self.states: dict[str, int] = {}
        self._allocations = Allocations()
        self._collectives = Collectives(topology, gloo=gloo, seen=self._seen)
        self._micro_step = self._times = 0

    @contextmanager
    def entered(self) -> Iterator[FakeTensorMode]:
        with FakeTensorMode() as fake, self._allocations, WithoutValues(self._collectives, self._allocations):
            yield fake

    @property
    def peak(self) -> dict[str, int]:
        return self._allocations.peak

    @property
    def on_host_bytes(self) -> int:
        return self._allocations.live.get(ON_HOST, 0)

    def model(
        self,
        model: nn.Module,
        schedule: AccumulationSchedule,
        optimizer: Optimizer,
        *,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        """Watch the memory of a model, its schedule, its optimizer and its averages."""
        self._model, self._schedule, self._optimizer = model, schedule, optimizer
        self._units = list(fsdp_modules(model).values())
        self._hooked: set[nn.Parameter] = set()
        self._allocations.assign(PARAMETERS, [p for unit in self._units for p in sharded_parameters(unit)])
        self._allocations.assign(PARAMETERS, model.buffers())
        for average in averages:
            self._allocations.assign(PARAMETERS, [*average.parameters(), *average.buffers()])
        for unit in self._units:
            self._allocations.move_to_host(shards_on_host(unit))
            copy_gradients(unit, _copy_to_host)

    def begin(self) -> None:
        """Report everything from now on."""
        claim = weakref.WeakMethod(self._claim_gradient)  # Python never collects what hooks of this kind refer to
        for parameter in (p for unit in self._units for p in unsharded_parameters(unit)):
            parameter.register_post_accumulate_grad_hook(lambda p: claim()(p))  # type: ignore[no-untyped-call, misc]
        self.ran.clear()
        self._allocations.reset_peak()

    def now(self, micro_step: int, times: int) -> None:
        if micro_step == 0:
            live = self._allocations.live
            self.states = {name: live.get(name, 0) for name in (PARAMETERS, GRADIENTS, STATES)}
        self._micro_step, self._times = micro_step, times

    def claim(self) -> None:
        """Assign categories to the tensors that the schedule, FSDP2 and the optimizer own."""
        assign = self._allocations.assign
        assign(CACHED, [*self._schedule.cache.tensors(), *self._schedule.window.tensors()])
        for unit in self._units:
            assign(GRADIENTS, partial_sums(unit))
            assign(GRADIENTS, (p.grad for p in sharded_parameters(unit) if p.grad is not None))
        assign(STATES, _tensors(self._optimizer.state.values()))

    def _claim_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._allocations.assign(GRADIENTS, [parameter.grad], over=UNKNOWN)

    def _seen(self, collective: Collective, tensors: list[Tensor]) -> None:
        self.ran.append(ExecutedCollective(micro_step=self._micro_step, times=self._times, collective=collective))
        gathers = collective.kind == "all_gather"
        self._allocations.assign(GATHERED if gathers else REDUCING, tensors, over=UNKNOWN)


def _copy_to_host(tensor: Tensor) -> Tensor:
    with allocating_on_host():
        return tensor.clone()


def _tensors(states: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    for state in states:
        yield from (value for value in state.values() if isinstance(value, Tensor))
