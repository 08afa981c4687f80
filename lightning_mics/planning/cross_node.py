"""Whether parameters and gradients cross nodes once per optimizer step: bytes on the wire against memory.

Once per step never sends more. It takes memory on each rank: of M bytes of parameters M/k for the node's copy, with k
ranks of a partition group on a node, and the gradients' size / k for the node's sums. Where memory is left for one of
them only, the copy comes first: over s micro-steps it saves 2s-1 crossings of M bytes, the sums s-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_mics.communication import CrossNodeGather, CrossNodeReduce
from lightning_mics.planning.memory import USABLE_SHARE, ModelSize, in_gib
from lightning_mics.topology import Topology


@dataclass(frozen=True, kw_only=True)
class CrossNode:
    """When parameters and gradients cross nodes, with the reasons, and what it takes.

    Attributes:
        gather: When parameters cross.
        reduce: When gradients cross inside a partition group.
        why_gather: The reason, in a few words.
        why_reduce: The reason, in a few words.
        kept_bytes: What a rank keeps for it.
    """

    gather: CrossNodeGather
    reduce: CrossNodeReduce
    why_gather: str
    why_reduce: str
    kept_bytes: int


def choose_cross_node(
    size: ModelSize,
    topology: Topology,
    *,
    cross_node_gather: CrossNodeGather | Literal["auto"],
    cross_node_reduce: CrossNodeReduce | Literal["auto"],
    hierarchical: bool,
    capacity_bytes: int,
) -> CrossNode:
    """Replace "auto" by what memory allows.

    Args:
        size: What the model keeps.
        topology: Where every rank is.
        cross_node_gather: What the user has asked for.
        cross_node_reduce: What the user has asked for.
        hierarchical: Whether collectives of the partition group run in two stages.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states.
    """
    if not topology.spans_nodes:
        return _no_choice("a partition group is inside one node", "by the second hop")
    if not hierarchical and topology.local_ranks_per_partition_group > 1:
        return _no_choice("collectives are flat", "collectives are flat")
    k = topology.local_ranks_per_partition_group
    free_bytes = int(USABLE_SHARE * capacity_bytes) - size.per_rank_bytes(topology.partition_size)
    copy_bytes, sums_bytes = -(-size.gathered_bytes // k), -(-size.reduced_bytes // k)
    gather_once, why_gather = _decide(cross_node_gather, copy_bytes, free_bytes)
    kept_bytes = copy_bytes if gather_once else 0
    reduce_once, why_reduce = _decide(cross_node_reduce, sums_bytes, free_bytes - kept_bytes)
    return CrossNode(
        gather="once_per_step" if gather_once else "every_use",
        reduce="once_per_step" if reduce_once else "every_micro_step",
        why_gather=why_gather,
        why_reduce=why_reduce,
        kept_bytes=kept_bytes + (sums_bytes if reduce_once else 0),
    )


def _no_choice(why_gather: str, why_reduce: str) -> CrossNode:
    return CrossNode(
        gather="every_use", reduce="every_micro_step", why_gather=why_gather, why_reduce=why_reduce, kept_bytes=0
    )


def _decide(wanted: str, needed_bytes: int, free_bytes: int) -> tuple[bool, str]:
    price = f"{in_gib(needed_bytes)} per rank"
    if wanted != "auto":
        once = wanted == "once_per_step"
        return once, f"for {price}" if once else f"would take {price}"
    if needed_bytes <= free_bytes:
        return True, f'"auto": {price} of {in_gib(free_bytes)} that model states leave'
    return False, f'"auto": would take {price}, and model states leave {in_gib(max(0, free_bytes))}'
