"""``shard_model``: where the three techniques meet. Plain PyTorch, no trainer.

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

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_mics.sharding.activation_checkpointing import find_recomputed, recompute_in_backward
from lightning_mics.sharding.blocks import ModuleClasses, find_blocks
from lightning_mics.sharding.communication import Communication
from lightning_mics.sharding.initialization import FirstWeights, seeded_by_rank_0, verify_replicas
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.sharding.pretrained import load_sources
from lightning_mics.sharding.schedule import AccumulationSchedule
from lightning_mics.techniques.partition_groups import PartitionGroups


def shard_model(
    model: nn.Module,
    groups: PartitionGroups,
    *,
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    block_classes: ModuleClasses | None = None,
    activation_checkpointing: bool | ModuleClasses = False,
    mixed_precision: MixedPrecisionPolicy | None = None,
) -> AccumulationSchedule:
    """Shard ``model`` in place over this rank's partition group, one block at a time; every rank calls it.

    Peak memory is the shards plus one whole unit: a block, or what the root holds. The first weights depend on rank 0
    alone: for parts on the meta device on its seed, for built parts on its values. What
    :func:`~lightning_mics.sharding.pretrained.load_pretrained` has left for then is read when all is sharded.
    Make optimizers after this call.

    Args:
        model: A plain module, built, on the meta device, or some of each.
        groups: From :func:`~lightning_mics.techniques.partition_groups.create_partition_groups`.
        communication: How the collectives run; ``hierarchical`` follows the groups unless it is given.
        block_classes: The blocks; see :func:`~lightning_mics.sharding.blocks.find_blocks`.
        activation_checkpointing: True recomputes each block in backward; classes or class names choose other modules,
            patterns some of the blocks by their names: ``"network.transformer.h.*[02468]"``.
        mixed_precision: FSDP2's policy: dtypes of gathered parameters and of gradient reductions.

    Returns:
        The accumulation schedule: what is gathered and reduced in each micro-step, and what at the boundary.

    Raises:
        TypeError: If the model cannot be sharded: already wrapped, no blocks, tensors that nothing initialises.
        ValueError: If an option does not fit the model or the groups.
    """
    communication = communication.fitted_to(groups)
    blocks = find_blocks(model, block_classes)
    recomputed = find_recomputed(model, blocks, activation_checkpointing)
    first_weights = FirstWeights(model, blocks.values(), groups.device)
    with seeded_by_rank_0(groups.device):
        for unit in (*blocks.values(), model):
            first_weights.place(unit)
            fully_shard(unit, mesh=groups.mesh, mp_policy=mixed_precision or MixedPrecisionPolicy())
    recompute_in_backward(recomputed)
    load_sources(model)
    verify_replicas(model, groups)
    assert isinstance(model, FSDPModule)
    return Communication(groups, communication).install(model)


def mixed_precision_policy(precision: str, *, reduce_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """FSDP2's side of a precision: what it gathers and reduces in. Autocast casts what goes into operations.

    Args:
        precision: As Lightning names it: ``"32-true"``, ``"bf16-true"`` or ``"bf16-mixed"``.
        reduce_dtype: What gradients are reduced and summed in; None follows the precision.
    """
    mixed = precision == "bf16-mixed"
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None,
        reduce_dtype=reduce_dtype or (torch.float32 if mixed else None),
        cast_forward_inputs=False,
    )
