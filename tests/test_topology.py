"""Ranks, nodes and groups as integers."""

from __future__ import annotations

import itertools
import re

import pytest

from lightning_mics.topology import Topology, partition_sizes

SHAPES = [
    (world, k, p)
    for world, k in itertools.product((1, 2, 6, 8, 12, 16, 64), (1, 2, 3, 4, 8))
    if world % k == 0
    for p in partition_sizes(world_size=world, ranks_per_node=k)
]


def topology(world: int, k: int, p: int) -> Topology:
    return Topology(world_size=world, ranks_per_node=k, partition_size=p)


def test_partition_groups_are_consecutive_ranks_listed_rail_by_rail():
    eight = topology(8, 2, 4)
    assert eight.partition_group(3) == (0, 2, 1, 3)
    assert eight.partition_group(4) == (4, 6, 5, 7)
    assert eight.rail(3) == (1, 3)
    assert eight.node_group(3) == (2, 3)
    assert eight.replication_group(3) == (3, 7)


def test_the_paper_example_of_replication_groups():
    sixteen = topology(16, 8, 8)
    assert sixteen.replication_group(2) == (2, 10)
    assert sixteen.partition_group(9) == tuple(range(8, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_of_each_kind_cover_every_rank_once(shape):
    t = topology(*shape)
    for group_of in (t.partition_group, t.replication_group, t.rail, t.node_group):
        groups = {group_of(rank) for rank in range(t.world_size)}
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(t.world_size))
        assert all(rank in group_of(rank) for rank in range(t.world_size))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_rail_gathers_is_one_slice_of_the_partition_group(shape):
    t = topology(*shape)
    for rank in range(t.world_size):
        group, rail, node = t.partition_group(rank), t.rail(rank), t.node_group(rank)
        slice_of_this_rail = node.index(rank)
        start = slice_of_this_rail * len(rail)
        assert group[start : start + len(rail)] == rail
        assert len(rail) == t.nodes_per_partition_group
        assert len(node) == t.local_ranks_per_partition_group
        assert len({t.node_of(member) for member in rail}) == len(rail)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 8, 12), "partition_size=12 does not divide world_size=64; with 8 ranks per node use one of 1, 2, 4, 8, "),
        ((24, 8, 12), "partition_size=12 cuts through nodes of 8 ranks; with 8 ranks per node use one of 1, 2, 4, 8, "),
        ((6, 4, 2), "ranks_per_node=4 does not divide world_size=6: every node needs the same number of ranks; with 6"),
        ((8, 2, 0), "partition_size=0 must be at least 1"),
        ((8, -2, 2), "ranks_per_node=-2 must be at least 1"),
        ((8, 2, 16), "partition_size=16 does not divide world_size=8"),
    ],
)
def test_impossible_sizes_are_refused_with_the_sizes_that_would_work(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        topology(*shape)


@pytest.mark.parametrize("size", [2.0, "2", True, None])
def test_sizes_must_be_integers(size):
    with pytest.raises(TypeError, match="partition_size must be an integer"):
        topology(8, 2, size)


def test_a_rank_outside_the_job_is_refused():
    with pytest.raises(ValueError, match="rank=8 is not one of the 8 ranks 0 to 7"):
        topology(8, 2, 4).rail(8)
