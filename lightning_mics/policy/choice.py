"""What "auto" stands for: the partition size, and where parameters are cached and gradients accumulated.

The partition group is the smallest whole number of nodes that holds the model states (MiCS, section 3.1).

Caching parameters and accumulating gradients trades memory for traffic. On nodes, with M bytes of parameters and k
ranks of a partition group per node, the cache takes M/k bytes of each rank, and accumulated gradients take their size
/ k. If memory is left for only one of them, parameters take precedence: over s micro-steps their cache saves 2s-1
times M bytes of inter-node traffic, accumulated gradients save s-1 times.

If neither fits, as many blocks as fit are cached on nodes, spread over the depth, and then as many accumulated.

On ranks, the cache takes M bytes, and accumulated gradients take their full size. Links inside a node are fast, and
sharding is there to save memory, so "auto" does it only if the unsharded model states, as in DDP, would fit a rank.
Optimizer states stay sharded, so this takes less memory than DDP.

Strategies choose by :func:`choose`: they know the size of the model, and neither rates nor batches. Plans, which know
all of these, choose by time (:mod:`lightning_mics.policy.candidates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_mics.policy.memory import USABLE_SHARE, ModelSize, fits, in_gib, smallest_partition_size
from lightning_mics.sharding.options import CommunicationOptions, size_of_share, spread_over
from lightning_mics.techniques.partition_groups import choose_hierarchical
from lightning_mics.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to shard a model over a job, with reasons.

    Attributes:
        topology: Topology of the job.
        communication: Options of :func:`~lightning_mics.sharding.shard_model.shard_model`, none of them "auto".
        reasons: Reason for each value that may be "auto", by the name of the option.
        states_bytes: Model states of a rank, with the unsharded parameters and gradients of the peak, in bytes.
        cached_bytes: Cached parameters and accumulated gradients of a rank, in bytes.
        capacity_bytes: Memory of a rank's device, in bytes.
    """

    topology: Topology
    communication: CommunicationOptions
    reasons: Mapping[str, str]
    states_bytes: int
    cached_bytes: int
    capacity_bytes: int

    @property
    def fits(self) -> bool:
        """Whether model states and caches leave enough of the device for activations."""
        return self.states_bytes + self.cached_bytes <= USABLE_SHARE * self.capacity_bytes


def choose(
    size: ModelSize,
    *,
    world_size: int,
    ranks_per_node: int,
    capacity_bytes: int,
    partition_size: int | Literal["auto"] = "auto",
    communication: CommunicationOptions = CommunicationOptions.AUTO,
) -> Choice:
    """Replace "auto" by what memory allows.

    Args:
        size: Size of the model, from :func:`~lightning_mics.policy.memory.measure_model`.
        world_size: Ranks in the job.
        ranks_per_node: Ranks on each node.
        capacity_bytes: Memory of one rank's device, of which ``USABLE_SHARE`` is for model states and caches.
        partition_size: Ranks per partition group, or "auto".
        communication: Options of the user.

    Raises:
        TypeError: If the partition size is not an integer.
        ValueError: If it does not fit the job, or ``hierarchical=True`` does not fit it.
    """
    reasons = {"partition_size": "given"}
    if partition_size == "auto":
        partition_size = smallest_partition_size(
            size, world_size=world_size, ranks_per_node=ranks_per_node, capacity_bytes=capacity_bytes
        )
        hold = fits(size, partition_size, capacity_bytes)
        why = (
            "the fewest whole nodes that hold the model states"
            if hold
            else "all ranks, which hardly hold the model states"
        )
        reasons["partition_size"] = f'"auto": {why}'
    topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size)
    hierarchical = choose_hierarchical(communication.hierarchical, topology)
    states_bytes = size.per_rank_bytes(partition_size)
    memory = _Memory(
        topology=topology,
        in_stages=hierarchical or topology.local_ranks_per_partition_group == 1,
        free_bytes=int(USABLE_SHARE * capacity_bytes) - states_bytes,
        fits_unsharded=fits(size, 1, capacity_bytes),
    )
    if communication.allow_unused:  # they take the memory in any case
        communication = communication.on_ranks()
    cache = _weigh(communication.cache_parameters, size.gathered_bytes, size.blocks_gathered_bytes, memory)
    memory = replace(memory, free_bytes=memory.free_bytes - cache.bytes)
    if communication.two_hop:
        accumulate = _weigh(communication.accumulate_gradients, size.reduced_bytes, size.blocks_reduced_bytes, memory)
    else:
        accumulate = _Place(None, "two_hop=False reduces in every micro-step")
    cached_bytes = cache.bytes + accumulate.bytes
    if communication.allow_unused and partition_size > 1:
        cached_bytes = size.gathered_bytes + size.reduced_bytes
    return Choice(
        topology=topology,
        communication=replace(
            communication,
            hierarchical=hierarchical,
            cache_parameters=cache.level or "never",
            accumulate_gradients=accumulate.level or "shard",
        ),
        reasons={
            **reasons,
            "hierarchical": _why_hierarchical(topology, hierarchical),
            "cache_parameters": cache.why,
            "accumulate_gradients": accumulate.why,
        },
        states_bytes=states_bytes,
        cached_bytes=cached_bytes,
        capacity_bytes=capacity_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Memory:
    topology: Topology
    in_stages: bool  # whether inter-node collectives are a stage of their own
    free_bytes: int  # left by model states
    fits_unsharded: bool  # whether the unsharded model states would fit a rank


@dataclass(frozen=True)
class _Place:
    level: Literal["node", "rank"] | float | None
    why: str
    bytes: int = 0


def _weigh(wanted: str | float, unsharded_bytes: int, blocks_bytes: Sequence[int], memory: _Memory) -> _Place:
    """Where ``unsharded_bytes`` are cached until the boundary: on ranks, on nodes, those of some blocks, or nowhere."""
    if memory.topology.partition_size == 1:
        return _Place(None, "a partition group is one rank")
    k = memory.topology.local_ranks_per_partition_group
    node_bytes = -(-unsharded_bytes // k)
    on_rank, on_node = f"{in_gib(unsharded_bytes)} per rank", f"{in_gib(node_bytes)} per rank"
    no_node = _why_not_on_nodes(memory)
    left = f"{in_gib(max(0, memory.free_bytes))}"
    if wanted == "rank":
        return _Place("rank", f"for {on_rank}", unsharded_bytes)
    if wanted == "node":
        return _Place(None, no_node) if no_node else _Place("node", f"for {on_node}", node_bytes)
    if isinstance(wanted, float):
        taken = bytes_of_share(wanted, blocks_bytes, k)
        why = f"{_blocks(wanted, blocks_bytes)} on nodes, for {in_gib(taken)} per rank"
        return _Place(None, no_node) if no_node else _Place(wanted, why, taken)
    if wanted != "auto":
        return _Place(None, f'"rank" would take {on_rank}' if no_node else f'"node" would take {on_node}')
    if memory.fits_unsharded and unsharded_bytes <= memory.free_bytes:
        return _Place("rank", f'"auto": {on_rank} of {left} that model states leave', unsharded_bytes)
    if no_node:
        too_large = "unsharded model states do not fit a rank"
        full = f'"rank" would take {on_rank}, and model states leave {left}'
        return _Place(None, f'"auto": {full if memory.fits_unsharded else too_large}; {no_node}')
    if node_bytes <= memory.free_bytes:
        return _Place("node", f'"auto": {on_node} of {left} that model states leave', node_bytes)
    all_would = f'"node" would take {on_node}, and model states leave {left}'
    share = largest_share(blocks_bytes, k, memory.free_bytes)
    if share is None:
        return _Place(None, f'"auto": {all_would}')
    taken = bytes_of_share(share, blocks_bytes, k)
    return _Place(share, f'"auto": {_blocks(share, blocks_bytes)} on nodes, for {in_gib(taken)}; {all_would}', taken)


def largest_share(blocks_bytes: Sequence[int], local_ranks: int, free_bytes: int) -> float | None:
    """The largest share of blocks that can be cached on nodes; None if that is none.

    Args:
        blocks_bytes: Unsharded size of each block, in bytes.
        local_ranks: Ranks of a partition group on each node.
        free_bytes: Memory that a rank has left, in bytes.
    """
    shares = (count / len(blocks_bytes) for count in range(len(blocks_bytes), 0, -1))
    return next((share for share in shares if bytes_of_share(share, blocks_bytes, local_ranks) <= free_bytes), None)


def bytes_of_share(share: float, blocks_bytes: Sequence[int], local_ranks: int) -> int:
    """Bytes of each rank for a share of blocks that are cached on nodes.

    Args:
        share: Share of the blocks, 0 to 1.
        blocks_bytes: Unsharded size of each block, in bytes.
        local_ranks: Ranks of a partition group on each node.
    """
    return -(-size_of_share(blocks_bytes, share) // local_ranks)


def _blocks(share: float, blocks_bytes: Sequence[int]) -> str:
    return f"{sum(spread_over(len(blocks_bytes), share))} of {len(blocks_bytes)} blocks"


def _why_not_on_nodes(memory: _Memory) -> str:
    if not memory.topology.spans_nodes:
        return "a partition group is inside one node"
    return "" if memory.in_stages else "collectives are flat"


def _why_hierarchical(topology: Topology, hierarchical: bool) -> str:
    if hierarchical:
        return f"a partition group spans {topology.nodes_per_partition_group} nodes"
    if not topology.spans_nodes:
        return "a partition group is inside one node"
    if topology.local_ranks_per_partition_group == 1:
        return "one rank per node, so there is no second stage"
    return "hierarchical=False"
