"""What crosses nodes once per step, by memory."""

from __future__ import annotations

import pytest
from lightning_mics.planning.cross_node import CrossNode, choose_cross_node

from lightning_mics.planning.memory import ModelSize
from lightning_mics.topology import Topology

GIB = 2**30
SIZE = ModelSize(  # on 8 ranks 8 GiB of states each; over nodes of 4 ranks 1 GiB for the copy and 2 for the sums
    states_bytes=64 * GIB,
    root_bytes=0,
    root_reduced_bytes=0,
    block_bytes=0,
    block_reduced_bytes=0,
    gathered_bytes=4 * GIB,
    reduced_bytes=8 * GIB,
)
OVER_NODES = Topology(world_size=16, ranks_per_node=4, partition_size=8)


def choose(
    usable_gib: float,
    *,
    gather: str = "auto",
    reduce: str = "auto",
    topology: Topology = OVER_NODES,
    staged: bool = True,
) -> CrossNode:
    return choose_cross_node(
        SIZE,
        topology,
        cross_node_gather=gather,
        cross_node_reduce=reduce,
        hierarchical=staged,
        capacity_bytes=int(usable_gib * GIB / 0.75) + 1,
    )


@pytest.mark.parametrize(
    ("usable_gib", "gather", "reduce", "kept_gib"),
    [
        (11, "once_per_step", "once_per_step", 3),
        (10.9, "once_per_step", "every_micro_step", 1),
        (9, "once_per_step", "every_micro_step", 1),
        (8.9, "every_use", "every_micro_step", 0),
        (4, "every_use", "every_micro_step", 0),
    ],
)
def test_auto_keeps_what_memory_allows_the_copy_first(usable_gib, gather, reduce, kept_gib):
    chosen = choose(usable_gib)
    assert (chosen.gather, chosen.reduce, chosen.kept_bytes) == (gather, reduce, kept_gib * GIB)


def test_the_reasons_name_both_sides_of_the_scale():
    assert choose(12).why_gather == '"auto": 1 GiB per rank of 4 GiB that model states leave'
    assert choose(12).why_reduce == '"auto": 2 GiB per rank of 3 GiB that model states leave'
    assert choose(8.5).why_gather == '"auto": would take 1 GiB per rank, and model states leave 0.5 GiB'
    assert choose(1).why_gather == '"auto": would take 1 GiB per rank, and model states leave 0 GiB'


def test_what_the_user_says_is_done_whatever_it_takes():
    forced = choose(1, gather="once_per_step", reduce="once_per_step")
    assert (forced.gather, forced.reduce, forced.kept_bytes) == ("once_per_step", "once_per_step", 3 * GIB)
    refused = choose(100, gather="every_use", reduce="every_micro_step")
    assert (refused.gather, refused.reduce, refused.kept_bytes) == ("every_use", "every_micro_step", 0)
    assert (forced.why_gather, refused.why_gather) == ("for 1 GiB per rank", "would take 1 GiB per rank")


def test_without_a_stage_between_nodes_there_is_no_choice():
    inside = choose(100, topology=Topology(world_size=16, ranks_per_node=4, partition_size=4), staged=False)
    assert (inside.gather, inside.kept_bytes) == ("every_use", 0)
    assert (inside.why_gather, inside.why_reduce) == ("a partition group is inside one node", "by the second hop")
    flat = choose(100, staged=False)
    assert (flat.gather, flat.why_gather) == ("every_use", "collectives are flat")


def test_one_rank_per_node_needs_no_stages():
    chosen = choose(100, topology=Topology(world_size=8, ranks_per_node=1, partition_size=8), staged=False)
    assert (chosen.gather, chosen.kept_bytes) == ("once_per_step", 12 * GIB)
