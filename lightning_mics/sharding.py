"""``shard_model``: where the three techniques meet. Plain PyTorch, no trainer.

::

    groups = create_groups(Topology(world_size=8, ranks_per_node=4, partition_size=4), device_type="cuda")
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

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_mics._torch_compat import fsdp_modules
from lightning_mics.blocks import ModuleClasses, find_blocks, find_modules
from lightning_mics.first_weights import FirstWeights, seeded_by_rank_0, verify_replicas
from lightning_mics.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.partition_groups import PartitionGroups
from lightning_mics.topology import Topology
from lightning_mics.two_hop import TwoHopSchedule

CACHES = ("past_key_values", "past_key_value", "layer_past")  # what blocks of `transformers` call it


def shard_model(
    model: nn.Module,
    groups: PartitionGroups,
    *,
    shard_modules: ModuleClasses | None = None,
    hierarchical: bool | Literal["auto"] = "auto",
    activation_checkpointing: bool | ModuleClasses = False,
    mixed_precision: MixedPrecisionPolicy | None = None,
) -> TwoHopSchedule:
    """Shard ``model`` in place over this rank's partition group, one block at a time; every rank calls it.

    Peak memory is the shards plus one whole unit: a block, or what the root holds. The first weights depend on rank 0
    alone: for parts on the meta device on its seed, for built parts on its values. Make optimizers after this call.

    Args:
        model: A plain module, built, on the meta device, or some of each.
        groups: From :func:`~lightning_mics.partition_groups.create_groups`.
        shard_modules: The blocks; see :func:`~lightning_mics.blocks.find_blocks`.
        hierarchical: Two-stage collectives; see :func:`choose_hierarchical`.
        activation_checkpointing: True recomputes each block in backward; classes or class names choose other modules.
        mixed_precision: FSDP2's policy: dtypes of gathered parameters and of gradient reductions.

    Returns:
        The schedule of the two hops.

    Raises:
        TypeError: If the model cannot be sharded: already wrapped, no blocks, tensors that nothing initialises.
        ValueError: If an option does not fit the model or the topology.
    """
    in_stages = choose_hierarchical(hierarchical, groups.topology)
    blocks = find_blocks(model, shard_modules)
    recomputed = find_recomputed(model, blocks, activation_checkpointing)
    first_weights = FirstWeights(model, blocks.values(), groups.device)
    with seeded_by_rank_0(groups.device):
        for unit in (*blocks.values(), model):
            first_weights.place(unit)
            fully_shard(unit, mesh=groups.mesh, mp_policy=mixed_precision or MixedPrecisionPolicy())
    for module in recomputed:
        module.forward = _recomputing(module.forward)
    if in_stages:
        _use_hierarchical(model, groups)
    verify_replicas(model, groups)
    assert isinstance(model, FSDPModule)
    return TwoHopSchedule(model, replicas=groups.topology.replicas)


def choose_hierarchical(hierarchical: bool | Literal["auto"], topology: Topology) -> bool:
    """Whether collectives of the partition group run in two stages; "auto": where it spans nodes of two ranks or more.

    Raises:
        ValueError: If the value is unknown, or True where a partition group is inside one node.
    """
    if hierarchical == "auto":
        return topology.spans_nodes and topology.local_ranks_per_partition_group > 1
    check_hierarchical(hierarchical)
    if hierarchical and not topology.spans_nodes:
        raise ValueError(
            f"hierarchical=True needs partition groups over several nodes, but partition_size="
            f"{topology.partition_size} fits one node of {topology.ranks_per_node} ranks; use hierarchical='auto'"
        )
    return hierarchical


def check_hierarchical(hierarchical: object) -> None:
    """Refuse anything but "auto", True and False, with a ValueError."""
    if hierarchical != "auto" and not isinstance(hierarchical, bool):
        raise ValueError(f'hierarchical={hierarchical!r} is not one of "auto", True, False')


def find_recomputed(
    model: nn.Module, blocks: dict[str, nn.Module], activation_checkpointing: bool | ModuleClasses
) -> list[nn.Module]:
    """The modules that are recomputed in backward.

    Raises:
        TypeError: If ``activation_checkpointing`` holds anything but module classes and their names.
        ValueError: If one of these classes is not in the model.
    """
    if isinstance(activation_checkpointing, bool):
        return list(blocks.values()) if activation_checkpointing else []
    return list(find_modules(model, activation_checkpointing, option="activation_checkpointing").values())


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` that keeps only its inputs. A cache of keys and values is left out: recomputing would extend it."""
    names = inspect.signature(forward).parameters
    caches = {index for index, name in enumerate(names) if name in CACHES}

    # a function, not a partial: torch.compile leaves out whatever a partial of `checkpoint` calls
    def recomputed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(None if index in caches else value for index, value in enumerate(args))
        kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed_forward


def _use_hierarchical(model: nn.Module, groups: PartitionGroups) -> None:
    assert groups.rail is not None and groups.node is not None  # a partition group that spans nodes has them
    all_gather = HierarchicalAllGather(rail=groups.rail, node=groups.node)
    reduce_scatter = HierarchicalReduceScatter(rail=groups.rail, node=groups.node)
    for module in fsdp_modules(model).values():
        module.set_custom_all_gather(all_gather)
        module.set_custom_reduce_scatter(reduce_scatter)
