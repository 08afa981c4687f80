"""What travels once per optimizer step, between nodes and inside them: bytes on the wire against memory.

Once per step never sends more. Between nodes it takes memory on each rank: of M bytes of parameters M/k for the node's
copy, with k ranks of a partition group on a node, and the gradients' size / k for the node's sums. Where memory is left
for one of them only, the copy comes first: over s micro-steps it saves 2s-1 crossings of M bytes, the sums s-1.

Inside nodes too it takes the whole M, and the gradients' whole size. Links inside a node are fast, and who shards does
so to save memory, so "auto" does it only where nothing would have to be sharded: where the model states of the whole
model fit a rank, as DDP has them. Optimizer states stay sharded, so it takes less than DDP then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lightning_mics.policy.memory import USABLE_SHARE, ModelSize, fits, in_gib
from lightning_mics.sharding.options import Gather, OncePerStepOptions, Reduce
from lightning_mics.topology import Topology

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How often one kind of traffic runs, and why.

    Attributes:
        once: Whether once per step.
        why: The reason, in a few words.
        kept_bytes: What a rank keeps for it.
    """

    once: bool
    why: str
    kept_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class OncePerStep:
    """What travels once per step: parameters and gradients, between nodes and inside them."""

    cross_node_gather: Choice
    cross_node_reduce: Choice
    in_node_gather: Choice
    in_node_reduce: Choice

    @property
    def kept_bytes(self) -> int:
        """What a rank keeps for all of it."""
        choices = (self.cross_node_gather, self.cross_node_reduce, self.in_node_gather, self.in_node_reduce)
        return sum(choice.kept_bytes for choice in choices)

    def why(self, option: str) -> str:
        """The reason for the value of one of the :meth:`options`."""
        inside: Choice = getattr(self, option.replace("cross", "in"))
        choice: Choice = getattr(self, option)
        return "as inside nodes" if inside.once and choice is not inside else choice.why

    def options(self) -> OncePerStepOptions:
        """The options of :func:`~lightning_mics.sharding.shard_model.shard_model`, and of the strategy.

        What travels once per step inside nodes does so between them, even where there is nothing between them.
        """
        gather = self.in_node_gather if self.in_node_gather.once else self.cross_node_gather
        reduce = self.in_node_reduce if self.in_node_reduce.once else self.cross_node_reduce
        return {
            "cross_node_gather": _when_gathered(gather),
            "cross_node_reduce": _when_reduced(reduce),
            "in_node_gather": _when_gathered(self.in_node_gather),
            "in_node_reduce": _when_reduced(self.in_node_reduce),
        }


def choose_once_per_step(
    size: ModelSize,
    topology: Topology,
    *,
    cross_node_gather: Gather | Auto,
    cross_node_reduce: Reduce | Auto,
    in_node_gather: Gather | Auto,
    in_node_reduce: Reduce | Auto,
    two_hop: bool,
    hierarchical: bool,
    capacity_bytes: int,
) -> OncePerStep:
    """Replace "auto" by what memory allows.

    Args:
        size: What the model keeps.
        topology: Where every rank is.
        cross_node_gather: What the user has asked for.
        cross_node_reduce: What the user has asked for.
        in_node_gather: What the user has asked for.
        in_node_reduce: What the user has asked for.
        two_hop: Whether the second hop waits for the boundary; if not, nothing may keep gradients back from it.
        hierarchical: Whether collectives of the partition group run in two stages.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states.
    """
    if not two_hop:
        cross_node_reduce = in_node_reduce = "every_micro_step"
    free_bytes = int(USABLE_SHARE * capacity_bytes) - size.per_rank_bytes(topology.partition_size)
    memory = _Memory(free_bytes=free_bytes, holds_whole=fits(size, 1, capacity_bytes))
    gather_in_node = _inside_nodes(in_node_gather, cross_node_gather, size.gathered_bytes, topology, memory)
    gather = _between_nodes(
        cross_node_gather, size.gathered_bytes, topology, memory, hierarchical=hierarchical, in_node=gather_in_node
    )
    memory = replace(memory, free_bytes=free_bytes - gather_in_node.kept_bytes - gather.kept_bytes)
    reduce_in_node = _inside_nodes(in_node_reduce, cross_node_reduce, size.reduced_bytes, topology, memory)
    reduce = _between_nodes(
        cross_node_reduce, size.reduced_bytes, topology, memory, hierarchical=hierarchical, in_node=reduce_in_node
    )
    return OncePerStep(
        cross_node_gather=gather,
        cross_node_reduce=reduce,
        in_node_gather=gather_in_node,
        in_node_reduce=reduce_in_node,
    )


@dataclass(frozen=True, kw_only=True)
class _Memory:
    free_bytes: int  # what model states leave
    holds_whole: bool  # whether a rank could hold the model states of the whole model


def _inside_nodes(wanted: str, between_nodes: str, size_bytes: int, topology: Topology, memory: _Memory) -> Choice:
    if topology.partition_size == 1:
        return Choice(once=False, why="a partition group is one rank")
    if wanted == "auto" and between_nodes not in ("auto", "once_per_step"):
        return Choice(once=False, why='"auto": as between nodes')
    if wanted == "auto" and not memory.holds_whole:
        return Choice(once=False, why='"auto": a rank does not hold the whole model states')
    return _weigh(wanted, size_bytes, memory)


def _between_nodes(
    wanted: str, size_bytes: int, topology: Topology, memory: _Memory, *, hierarchical: bool, in_node: Choice
) -> Choice:
    if not topology.spans_nodes:
        return Choice(once=False, why="a partition group is inside one node")
    if in_node.once:
        return Choice(once=True, why="as inside nodes")
    if not hierarchical and topology.local_ranks_per_partition_group > 1:
        return Choice(once=False, why="collectives are flat")
    return _weigh(wanted, -(-size_bytes // topology.local_ranks_per_partition_group), memory)


def _weigh(wanted: str, needed_bytes: int, memory: _Memory) -> Choice:
    price = f"{in_gib(needed_bytes)} per rank"
    if wanted == "once_per_step":
        return Choice(once=True, why=f"for {price}", kept_bytes=needed_bytes)
    if wanted != "auto":
        return Choice(once=False, why=f"would take {price}")
    if needed_bytes <= memory.free_bytes:
        left = in_gib(memory.free_bytes)
        return Choice(once=True, why=f'"auto": {price} of {left} that model states leave', kept_bytes=needed_bytes)
    left = in_gib(max(0, memory.free_bytes))
    return Choice(once=False, why=f'"auto": would take {price}, and model states leave {left}')


def _when_gathered(choice: Choice) -> Gather:
    return "once_per_step" if choice.once else "every_use"


def _when_reduced(choice: Choice) -> Reduce:
    return "once_per_step" if choice.once else "every_micro_step"
