"""For how many blocks ranks hold frozen weights, and what that takes: ``frozen_on_ranks``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_mics.policy.memory import ModelSize, in_gib
from lightning_mics.sharding.modules.frozen_blocks import frozen_blocks, units_on_ranks
from lightning_mics.sharding.options import share_of, spread_over
from lightning_mics.topology import Topology


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
