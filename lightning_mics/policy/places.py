"""Where parameters are cached, gradients accumulated and frozen weights held, by the memory that is left for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mics.policy.memory import ModelSize, in_gib
from lightning_mics.sharding.modules.frozen_blocks import frozen_blocks, units_on_ranks
from lightning_mics.sharding.options import share_of, size_of_share, spread_over
from lightning_mics.techniques.cache_offload import AT_ONCE
from lightning_mics.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank's memory leaves for caches and sums.

    Attributes:
        topology: Topology of the job.
        on_nodes: Whether anything can be cached, or accumulated, on nodes where a partition group spans several.
        free_bytes: Bytes of the device that model states leave.
        fits_unsharded: Whether the unsharded model states would fit a rank.
        offload: Whether what is on nodes waits in host memory.
    """

    topology: Topology
    on_nodes: bool
    free_bytes: int
    fits_unsharded: bool
    offload: bool = False


@dataclass(frozen=True)
class Place:
    """Where unsharded values are until the boundary, and why.

    Attributes:
        level: On each "node", on each "rank", a share of the blocks on nodes; None where none are.
        why: Reason.
        bytes: Bytes of the device of each rank.
        host_bytes: Bytes of the host's memory for each rank.
    """

    level: Literal["node", "rank"] | float | None
    why: str
    bytes: int = 0
    host_bytes: int = 0


def weigh(wanted: str | float, unsharded_bytes: int, blocks_bytes: Sequence[int], memory: Memory) -> Place:
    """Where ``unsharded_bytes`` are cached until the boundary: on ranks, on nodes, those of some blocks, or nowhere.

    Args:
        wanted: Value of the option.
        unsharded_bytes: Unsharded size of all parameter groups, in bytes.
        blocks_bytes: Unsharded size of each block, in bytes.
        memory: What is left of a rank's memory.
    """
    if memory.topology.partition_size == 1:
        return Place(None, "a partition group is one rank")
    k = memory.topology.local_ranks_per_partition_group
    node_bytes = -(-unsharded_bytes // k)
    on_rank, on_node = f"{in_gib(unsharded_bytes)} per rank", f"{in_gib(node_bytes)} per rank"
    no_node = _why_not_on_nodes(memory)
    left = f"{in_gib(max(0, memory.free_bytes))}"
    if memory.offload and not no_node and (wanted in ("auto", "node") or isinstance(wanted, float)):
        return _on_host(wanted, unsharded_bytes, blocks_bytes, k)
    if wanted == "rank":
        return Place("rank", f"for {on_rank}", unsharded_bytes)
    if wanted == "node":
        return Place(None, no_node) if no_node else Place("node", f"for {on_node}", node_bytes)
    if isinstance(wanted, float):
        taken = bytes_of_share(wanted, blocks_bytes, k)
        why = f"{_blocks(wanted, blocks_bytes)} on nodes, for {in_gib(taken)} per rank"
        return Place(None, no_node) if no_node else Place(wanted, why, taken)
    if wanted != "auto":
        return Place(None, f'"rank" would take {on_rank}' if no_node else f'"node" would take {on_node}')
    if memory.fits_unsharded and unsharded_bytes <= memory.free_bytes:
        return Place("rank", f'"auto": {on_rank} of {left} that model states leave', unsharded_bytes)
    if no_node:
        too_large = "unsharded model states do not fit a rank"
        full = f'"rank" would take {on_rank}, and model states leave {left}'
        return Place(None, f'"auto": {full if memory.fits_unsharded else too_large}; {no_node}')
    if node_bytes <= memory.free_bytes:
        return Place("node", f'"auto": {on_node} of {left} that model states leave', node_bytes)
    all_would = f'"node" would take {on_node}, and model states leave {left}'
    share = largest_share(blocks_bytes, k, memory.free_bytes)
    if share is None:
        return Place(None, f'"auto": {all_would}')
    taken = bytes_of_share(share, blocks_bytes, k)
    return Place(share, f'"auto": {_blocks(share, blocks_bytes)} on nodes, for {in_gib(taken)}; {all_would}', taken)


def _on_host(wanted: str | float, unsharded_bytes: int, blocks_bytes: Sequence[int], local_ranks: int) -> Place:
    level: Literal["node"] | float = "node"
    root_bytes, taken = unsharded_bytes - sum(blocks_bytes), -(-unsharded_bytes // local_ranks)
    if isinstance(wanted, float):
        level, root_bytes, taken = wanted, 0, bytes_of_share(wanted, blocks_bytes, local_ranks)
    passing = min(taken, AT_ONCE * -(-max(root_bytes, *blocks_bytes, 0) // local_ranks))
    given = '"auto": ' if wanted == "auto" else ""
    return Place(level, f"{given}{in_gib(taken)} of the host per rank, {in_gib(passing)} on the device", passing, taken)


def largest_share(blocks_bytes: Sequence[int], local_ranks: int, free_bytes: int) -> float | None:
    """The largest share of blocks that can be cached on nodes; None if that is none.

    Args:
        blocks_bytes: Unsharded size of each block, in bytes.
        local_ranks: Ranks of a partition group on each node.
        free_bytes: Memory that a rank has left, in bytes.
    """
    blocks = len(blocks_bytes)
    if blocks and min(blocks_bytes) == max(blocks_bytes) > 0:  # as in most models; there are many plans
        count = min(blocks, max(0, free_bytes) * local_ranks // blocks_bytes[0])
        return share_of(count, blocks) if count else None
    shares = (share_of(count, blocks) for count in range(blocks, 0, -1))
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


def _why_not_on_nodes(memory: Memory) -> str:
    if not memory.topology.spans_nodes:
        return "a partition group is inside one node"
    return "" if memory.on_nodes else "collectives are flat"


@dataclass(frozen=True)
class FrozenPlace:
    """What ranks hold of frozen weights.

    Attributes:
        share: Share of the blocks with frozen weights.
        why: Reason of the share; empty where nothing is frozen.
        bytes: Memory of each rank, in addition to what is cached else, in bytes.
    """

    share: float
    why: str = ""
    bytes: int = 0


def place_frozen(
    wanted: Any, size: ModelSize, topology: Topology, *, cached: str | float | None, free_bytes: int
) -> FrozenPlace:
    """For how many blocks ranks hold frozen weights.

    Args:
        wanted: The option: a share, or "auto", which is as much as memory allows.
        size: Size of the model.
        topology: Topology of the job.
        cached: Where parameters are cached else: "rank", "node", a share of the blocks, or None.
        free_bytes: Memory that a rank has left, in bytes.
    """
    blocks = len(frozen_blocks(size.units))
    if not blocks:
        return FrozenPlace(0.0)
    if topology.partition_size == 1:
        return FrozenPlace(0.0, "a partition group is one rank")
    if cached == "rank":
        return FrozenPlace(0.0, "parameters are cached on ranks")
    auto = '"auto": ' if wanted == "auto" else ""
    counts = [int(wanted * blocks + 1e-6)] if wanted != "auto" else range(blocks, 0, -1)
    for count in counts:
        share = share_of(count, blocks) if wanted == "auto" else wanted
        taken = bytes_of_frozen(share, size, cached=cached, local_ranks=topology.local_ranks_per_partition_group)
        if wanted != "auto" or taken <= free_bytes:
            why = f"{count} of {blocks} blocks, for {in_gib(taken)} per rank"
            return FrozenPlace(share, auto + why, taken)
    left = in_gib(max(0, free_bytes))
    return FrozenPlace(0.0, f"{auto}a block would take {in_gib(taken)} per rank, and {left} are left")


def bytes_of_frozen(share: float, size: ModelSize, *, cached: str | float | None, local_ranks: int) -> int:
    """Bytes of each rank for the blocks on ranks, beside what other caches take without them.

    The root's own parameters are unsharded at the peak of a step in any case.

    Args:
        share: Share of the blocks with frozen weights, 0 to 1.
        size: Size of the model.
        cached: Where parameters are cached else: "node", a share of the blocks, or None.
        local_ranks: Ranks of a partition group on each node.
    """
    blocks = size.blocks_gathered_bytes
    on_nodes = spread_over(len(blocks), cached) if isinstance(cached, float) else [cached == "node"] * len(blocks)
    on_ranks = units_on_ranks(size.units, share)[1:]
    whole = sum(taken for taken, on_rank in zip(blocks, on_ranks, strict=True) if on_rank)
    both = zip(blocks, on_ranks, on_nodes, strict=True)
    return whole - sum(taken for taken, on_rank, on_node in both if on_rank and on_node) // local_ranks
