"""``shard_model``: the three techniques on one ``nn.Module``, in a training loop of your own.

::

    groups = create_partition_groups(Topology(world_size=8, ranks_per_node=4, partition_size=4), device_type="cuda")
    schedule = shard_model(model, groups)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, batch in enumerate(batches, start=1):
        boundary = step % 4 == 0
        with schedule.micro_step(boundary=boundary):
            model(batch).backward()
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_mics._torch.dtensors.numbers import read_whole_numbers
from lightning_mics._torch.dtensors.random import draw_as_unsharded
from lightning_mics._torch.fsdp import has_inner_tensors
from lightning_mics._torch.host_memory import SavedOnHost
from lightning_mics._torch.module_classes import prepare_class
from lightning_mics._torch.parameter_hooks import carrying_over
from lightning_mics._torch.pickling import refuse_shards
from lightning_mics._torch.state_dict import accept_whole_tensors, keep_unsharded_in_steps
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.sharding.activation_checkpointing import find_recomputed, inputs_on_host, recompute_in_backward
from lightning_mics.sharding.blocks import ModuleClasses, aliased_parameters, find_blocks
from lightning_mics.sharding.communication import Communication
from lightning_mics.sharding.full_state_dict import reject_saving_of_shards
from lightning_mics.sharding.initialization import InitialWeights, seeded_by_rank_0
from lightning_mics.sharding.modules.base_weights import BaseWeights
from lightning_mics.sharding.modules.caches_on_host import bytes_on_host, check_caches_fit, smallest_host_bytes
from lightning_mics.sharding.modules.changes import keep_changes
from lightning_mics.sharding.modules.checks import warn_of_values_beside_weights
from lightning_mics.sharding.modules.copying import allow_copies
from lightning_mics.sharding.modules.dense_gradients import make_gradients_dense
from lightning_mics.sharding.optimizers.exchange import UnshardedParameters
from lightning_mics.sharding.optimizers.offload import Offload, check_offload, checked_offload, offload_policy
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.sharding.pretrained import load_sources
from lightning_mics.sharding.ranks.replicas import ReplicaCheck, checked_every, verify_replicas
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.techniques.partition_groups import PartitionGroups
from lightning_mics.techniques.sharded_dim import sharded_dim


def shard_model(
    model: nn.Module,
    groups: PartitionGroups,
    *,
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    block_classes: ModuleClasses | None = None,
    activation_checkpointing: bool | float | ModuleClasses = False,
    activation_offload: bool = False,
    offload: Offload = False,
    mixed_precision: MixedPrecisionPolicy | None = None,
    broadcast_buffers: bool = True,
    certify_every_n_steps: int | None = None,
) -> AccumulationSchedule:
    """Shard ``model`` in place over this rank's partition group, one block at a time; every rank calls it.

    Peak memory is the shards plus one unsharded parameter group: a block, or the root's own parameters. The initial
    weights depend on rank 0 alone: on its seed for modules on the meta device, on its values for others. Weights that
    :func:`~lightning_mics.sharding.pretrained.load_pretrained` has deferred are read after sharding.
    Create optimizers after this call.

    Args:
        model: The module, not sharded yet: with values, on the meta device, or partly so.
        groups: Process groups of this rank, from
            :func:`~lightning_mics.techniques.partition_groups.create_partition_groups`.
        communication: Options of communication; ``hierarchical="auto"`` follows the groups.
        block_classes: Classes of the blocks; see :func:`~lightning_mics.sharding.blocks.find_blocks`.
        activation_checkpointing: Whether each block is recomputed in backward; the share of the blocks that are, spread
            over the depth; or the modules to recompute: classes, class names, or patterns of block names, such as
            ``"network.transformer.h.*[02468]"``.
        activation_offload: Whether the inputs of recomputed blocks wait for the backward in host memory.
        offload: Whether model states are in host memory: True for weights, gradients and optimizer states,
            ``"optimizer"`` for its states alone; the groups must serve the host. See
            :mod:`~lightning_mics.sharding.optimizers.offload`.
        mixed_precision: FSDP2's policy: dtypes of unsharded parameters and of gradient reductions.
        broadcast_buffers: Whether all ranks get the buffers of rank 0 where they differ and are used or saved: see
            :mod:`~lightning_mics.sharding.modules.broadcast_buffers`.
        certify_every_n_steps: Number of optimizer steps between two comparisons of the replicas; None compares them at
            start and after loading only. See :mod:`~lightning_mics.sharding.ranks.replicas`.

    Returns:
        The accumulation schedule: which collectives run in each micro-step, and which at the boundary.

    Raises:
        TypeError: If the model cannot be sharded: already wrapped, no blocks, tensors that nothing initializes.
        ValueError: If an option does not fit the model or the groups.
        HostMemoryError: On all ranks, if caches and sums that wait in host memory do not fit it.
    """
    communication, every = communication.fitted_to(groups), checked_every(certify_every_n_steps)
    offload, dtypes = checked_offload(offload), mixed_precision or MixedPrecisionPolicy()
    check_offload(offload, communication=communication, gathered_dtype=dtypes.param_dtype)
    blocks = find_blocks(model, block_classes, may_be_empty=True)
    recomputed = find_recomputed(model, blocks, activation_checkpointing)
    processes = groups.topology.ranks_per_node
    cached = bytes_on_host(model, blocks, groups.topology, communication=communication, dtypes=dtypes)
    host_bytes = smallest_host_bytes(groups.control) if cached else None
    if host_bytes is not None:
        check_caches_fit(cached, host_bytes=host_bytes, processes=processes)
    sharding = _Sharding(
        groups=groups,
        communication=communication,
        blocks=list(blocks),
        recomputed=[name for name, module in model.named_modules() if module in set(recomputed)],
        on_host=inputs_on_host(recomputed, processes=processes, taken_bytes=cached) if activation_offload else None,
        offload=offload,
        mixed_precision=dtypes,
        broadcast_buffers=broadcast_buffers,
        traffic=Traffic(),
    )
    warn_of_values_beside_weights(model)
    unsharded = UnshardedParameters(model)
    make_gradients_dense(model)
    base_weights = BaseWeights(model)
    initial_weights = InitialWeights(model, blocks.values(), groups.device)
    with seeded_by_rank_0(groups.device):
        sharding.shard(model, place=initial_weights.place)
    read_whole_numbers()
    base_weights.sharded(model, read=load_sources(model))
    verify_replicas(model, groups)
    schedule = sharding.install(model)
    schedule.optimizer_hooks.unsharded = unsharded
    schedule.base_weights = base_weights
    if every is not None:
        trains_with = schedule.optimizer_hooks.trains_with
        schedule.replicas = ReplicaCheck(model, groups, every=every, trains_with=trains_with)
    return schedule


@dataclass(frozen=True)
class _Sharding:
    """How a model is sharded: the same for the model and for its copies.

    Attributes:
        groups: Process groups of this rank.
        communication: Options of communication.
        blocks: Names of the blocks, inner ones first.
        recomputed: Names of the modules that are recomputed in backward.
        on_host: Where their inputs wait for the backward; None leaves them on the device.
        offload: Which model states are in host memory.
        mixed_precision: FSDP2's policy.
        broadcast_buffers: Whether all ranks get the buffers of rank 0 where they differ and are used or saved.
        traffic: Counter of the collectives.
    """

    groups: PartitionGroups
    communication: CommunicationOptions
    blocks: Sequence[str]
    recomputed: Sequence[str]
    on_host: SavedOnHost | None
    offload: Offload
    mixed_precision: MixedPrecisionPolicy
    broadcast_buffers: bool
    traffic: Traffic

    def shard(self, model: nn.Module, *, place: Callable[[nn.Module], None] | None = None) -> None:
        """Shard the parameters of ``model``, one parameter group at a time.

        Args:
            model: The module.
            place: Called with a block, or the model, before its parameter group is sharded.
        """
        blocks = [model.get_submodule(name) for name in self.blocks]
        policy = offload_policy(self.offload, self.groups.device)
        for owner in (*blocks, model):
            if place is not None:
                place(owner)
            prepare_class(owner)
            aliased = aliased_parameters(owner, blocks)
            with carrying_over(owner):
                fully_shard(
                    owner,
                    mesh=self.groups.mesh,
                    shard_placement_fn=self._placement,
                    mp_policy=self.mixed_precision,
                    offload_policy=policy,
                    ignored_params=aliased or None,
                )
        accept_whole_tensors(model)
        keep_unsharded_in_steps(model)
        reject_saving_of_shards(model)
        refuse_shards(self.groups.mesh)
        draw_as_unsharded(self.groups.mesh)
        recompute_in_backward(map(model.get_submodule, self.recomputed), on_host=self.on_host)

    def _placement(self, parameter: nn.Parameter) -> Shard | None:
        """The dim along which a parameter, [any], is sharded; None for rows."""
        if has_inner_tensors(parameter):
            return None  # its class divides it, by rows
        dim = sharded_dim(parameter.shape, self.groups.topology.partition_size)
        return Shard(dim) if dim else None

    def install(self, model: nn.Module) -> AccumulationSchedule:
        """Give a sharded ``model`` its collectives, its schedule, and the way in which it is copied."""
        assert isinstance(model, FSDPModule)
        communication = Communication(
            self.groups, self.communication, broadcast_buffers=self.broadcast_buffers, traffic=self.traffic
        )
        schedule = communication.install(model)
        schedule.optimizer_hooks.offload = self.offload
        keep_changes(model, self.groups.mesh, schedule.window)
        allow_copies(model, self.groups.mesh, schedule.window, self._shard_copy)
        return schedule

    def _shard_copy(self, copy: nn.Module) -> None:
        self.shard(copy)
        self.install(copy)


def mixed_precision_policy(precision: str, *, reduce_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """FSDP2's dtypes for a precision. In mixed precision, autocast casts the inputs of operations, not FSDP2.

    Parameters are gathered in the dtype of autocast, which rounds them before most operations anyway, at half the
    bytes. Gradients are summed in float32: over ranks and micro-steps small ones would be lost in bfloat16, and in
    float16 the sums of scaled ones would overflow, which end at 65504, long before those of any rank did.

    Args:
        precision: Lightning's name of the precision: ``"32-true"``, ``"bf16-true"``, ``"bf16-mixed"`` or
            ``"16-mixed"``.
        reduce_dtype: Dtype in which gradients are reduced and accumulated; None follows the precision.
    """
    computed = autocast_dtype(precision)
    return MixedPrecisionPolicy(
        param_dtype=computed,
        reduce_dtype=reduce_dtype or (torch.float32 if computed else None),
        cast_forward_inputs=False,
    )


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that autocast computes in for a precision; None where there is no autocast.

    Args:
        precision: Lightning's name of the precision.
    """
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
