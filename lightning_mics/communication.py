"""Which collectives each unit uses: the techniques, joined for one topology and one choice of options.

A unit is what FSDP2 gathers and reduces together: a block, or what the root holds. What each does where a partition
group spans nodes, by default, with traffic between nodes once per step, and with all traffic once per step::

                    every use, every micro-step     between nodes once             inside nodes once too
    gather          rail, then node                 rail once, then node           rail and node once
    reduce          node, then rail                 node; at the boundary rail     at the boundary node, then rail
    second hop      all-reduce over replicas, at the boundary, in all
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch_compat import (
    AllGather,
    ReduceScatter,
    fsdp_modules,
    sharded_parameters,
    take_over_second_hop,
)
from lightning_mics.deferral import Deferral
from lightning_mics.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.kept_copy import KeptCopy
from lightning_mics.once_per_step import NodeCopy, NodeSums, RankCopy
from lightning_mics.partition_groups import PartitionGroups
from lightning_mics.topology import Topology
from lightning_mics.traffic import CountedGroup, ReduceOp, Traffic
from lightning_mics.two_hop import SecondHop, TwoHopSchedule

Gather = Literal["every_use", "once_per_step"]
Reduce = Literal["every_micro_step", "once_per_step"]
WIRE_DTYPES = (torch.float32, torch.bfloat16)


class FlatAllGather(AllGather):
    """All-gather over the whole partition group at once."""

    def __init__(self, partition: CountedGroup) -> None:
        self._partition = partition

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [ranks * shard]
        input_tensor: torch.Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._partition.all_gather(
            output_tensor, input_tensor, technique="gather in partition groups", async_op=async_op
        )


class FlatReduceScatter(ReduceScatter):
    """Reduce-scatter over the whole partition group at once."""

    def __init__(self, partition: CountedGroup) -> None:
        self._partition = partition

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [shard]
        input_tensor: torch.Tensor,  # [ranks * shard]
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._partition.reduce_scatter(
            output_tensor, input_tensor, op=op, technique="reduce in partition groups", async_op=async_op
        )


class Communication:
    """Gives the units of a sharded model their collectives.

    Args:
        groups: The groups of this rank.
        cross_node_gather: When parameters cross nodes.
        cross_node_reduce: When gradients cross nodes inside a partition group.
        in_node_gather: When parameters travel at all; once per step includes ``cross_node_gather``.
        in_node_reduce: When gradients travel at all; likewise.
        cross_node_dtype: What gradients travel in between nodes.
        two_hop: Whether the second hop waits for the boundary.
    """

    def __init__(
        self,
        groups: PartitionGroups,
        *,
        cross_node_gather: Gather,
        cross_node_reduce: Reduce,
        in_node_gather: Gather,
        in_node_reduce: Reduce,
        cross_node_dtype: torch.dtype | None,
        two_hop: bool,
    ) -> None:
        self._topology = groups.topology
        self._traffic = Traffic()
        self._partition = self._counted(groups.partition)
        self._replication = self._counted(groups.replication) if groups.replication else None
        self._rail = self._counted(groups.rail) if groups.rail else None
        self._node = self._counted(groups.node) if groups.node else None
        self._rank_keeps_copy = in_node_gather == "once_per_step"
        self._rank_keeps_sums = in_node_reduce == "once_per_step"
        self._node_keeps_copy = cross_node_gather == "once_per_step"
        self._node_keeps_sums = cross_node_reduce == "once_per_step"
        self._wire_dtype = cross_node_dtype
        self._two_hop = two_hop
        self._deferrals: dict[str, Deferral] = {}
        self._copies: list[KeptCopy] = []

    def install(self, root: FSDPModule) -> TwoHopSchedule:
        """Give every unit under ``root`` its collectives; returns the schedule that drives them."""
        for name, module in fsdp_modules(root).items():
            if self._topology.partition_size > 1:
                module.set_custom_all_gather(self._all_gather(module))
                if self._rank_keeps_copy:
                    self._copies.append(RankCopy(module))
                module.set_custom_reduce_scatter(self._reduce_scatter(name, module))
            if self._replication is not None:
                self._set_second_hop(name, module, self._replication)
        return TwoHopSchedule(
            root,
            replicas=self._topology.replicas,
            traffic=self._traffic,
            deferrals=self._deferrals,
            copies=self._copies,
            whole_gradients=self._rank_keeps_sums and self._topology.partition_size > 1,
            two_hop=self._two_hop,
        )

    def _all_gather(self, module: FSDPModule) -> AllGather:
        if self._rail is None:
            return FlatAllGather(self._partition)
        if self._rank_keeps_copy or not self._node_keeps_copy:
            return HierarchicalAllGather(rail=self._rail, node=self._node)
        copy = NodeCopy(rail=self._rail, node=self._node, module=module)
        self._copies.append(copy)
        return copy

    def _reduce_scatter(self, name: str, module: FSDPModule) -> ReduceScatter:
        if self._rail is None:
            return FlatReduceScatter(self._partition)
        if self._rank_keeps_sums or not self._node_keeps_sums:
            return HierarchicalReduceScatter(rail=self._rail, node=self._node, wire_dtype=self._wire_dtype)
        deferral = self._deferral(name, module)
        return NodeSums(rail=self._rail, node=self._node, deferral=deferral, wire_dtype=self._wire_dtype)

    def _set_second_hop(self, name: str, module: FSDPModule, replication: CountedGroup) -> None:
        if self._wire_dtype is None:

            def count(shard: torch.Tensor) -> None:
                replication.count_all_reduce(shard, technique="all-reduce over replicas")

            module.set_all_reduce_hook(count)  # FSDP2 calls it after its own all-reduce
            return
        after_sums = name in self._deferrals
        deferral = self._deferral(name, module)
        hop = SecondHop(replication=replication, wire_dtype=self._wire_dtype, deferral=deferral, after_sums=after_sums)
        take_over_second_hop(module, hop)

    def _deferral(self, name: str, module: FSDPModule) -> Deferral:
        return self._deferrals.setdefault(name, Deferral(lambda: sharded_parameters(module)))

    def _counted(self, group: dist.ProcessGroup) -> CountedGroup:
        ranks = dist.get_process_group_ranks(group)
        return CountedGroup(group, nodes=[self._topology.node_of(rank) for rank in ranks], traffic=self._traffic)


def check_traffic_options(
    topology: Topology,
    *,
    hierarchical: bool,
    cross_node_gather: str,
    cross_node_reduce: str,
    in_node_gather: str,
    in_node_reduce: str,
    cross_node_dtype: torch.dtype | None,
    two_hop: bool,
) -> None:
    """Refuse options that are unknown, or that flat collectives cannot serve.

    Args:
        topology: Where every rank is.
        hierarchical: Whether collectives are.
        cross_node_gather: When parameters cross nodes.
        cross_node_reduce: When gradients cross nodes.
        in_node_gather: When parameters travel inside nodes.
        in_node_reduce: When gradients travel inside nodes.
        cross_node_dtype: What gradients travel in between nodes.
        two_hop: Whether the second hop waits for the boundary.

    Raises:
        ValueError: If a value is unknown, needs hierarchical collectives where they are flat, or leaves the second hop
            nothing to reduce before the boundary.
    """
    check_choice("cross_node_gather", cross_node_gather, get_args(Gather))
    check_choice("cross_node_reduce", cross_node_reduce, get_args(Reduce))
    check_choice("in_node_gather", in_node_gather, get_args(Gather))
    check_choice("in_node_reduce", in_node_reduce, get_args(Reduce))
    if cross_node_dtype not in (None, *WIRE_DTYPES):
        raise ValueError(f"cross_node_dtype={cross_node_dtype!r} is not one of None, torch.float32, torch.bfloat16")
    check_two_hop(two_hop, cross_node_reduce=cross_node_reduce, in_node_reduce=in_node_reduce)
    if not topology.spans_nodes or hierarchical or topology.local_ranks_per_partition_group == 1:
        return
    once = "once_per_step"
    in_stages = {
        "cross_node_gather='once_per_step'": cross_node_gather == once and in_node_gather != once,
        "cross_node_reduce='once_per_step'": cross_node_reduce == once and in_node_reduce != once,
        f"cross_node_dtype={cross_node_dtype}": cross_node_dtype is not None,
    }
    for option, is_wanted in in_stages.items():
        if is_wanted:
            raise ValueError(
                f"{option} needs collectives that cross nodes in a stage of their own, but hierarchical=False and "
                f"partition_size={topology.partition_size} spans {topology.nodes_per_partition_group} nodes; use "
                'hierarchical="auto"'
            )


def check_two_hop(two_hop: bool, *, cross_node_reduce: str, in_node_reduce: str) -> None:
    """Refuse a second hop in every micro-step where sums are kept back until the boundary, with a ValueError."""
    if not isinstance(two_hop, bool):
        raise ValueError(f"two_hop={two_hop!r} is neither True nor False")
    for option, value in (("cross_node_reduce", cross_node_reduce), ("in_node_reduce", in_node_reduce)):
        if not two_hop and value == "once_per_step":
            raise ValueError(
                f"two_hop=False reduces over replicas in every micro-step, but {option}='once_per_step' keeps "
                "gradients back until the boundary; use 'every_micro_step', or two_hop=True"
            )


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of ``choices``, with a ValueError."""
    if value not in choices:
        raise ValueError(f"{option}={value!r} is not one of {', '.join(map(repr, choices))}")
