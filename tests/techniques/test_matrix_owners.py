"""Which rank owns a matrix, and which rows ranks hold of it."""

from __future__ import annotations

from itertools import chain

import pytest

from lightning_mics import Topology
from lightning_mics._torch.optimizers.muon import MuonUpdate
from lightning_mics.techniques.matrix_owners import OwnedMatrix, RowsOfRanks, choose_owners
from lightning_mics.topology import partition_sizes

CLUSTERS = [(4, 2), (8, 2), (8, 4), (8, 8), (4, 1), (16, 4)]
TOPOLOGIES = [
    Topology(world_size=world, ranks_per_node=k, partition_size=size)
    for world, k in CLUSTERS
    for size in partition_sizes(world_size=world, ranks_per_node=k)
]


@pytest.mark.parametrize("rows", [1, 7, 16, 33])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_holders_have_each_row_once_and_shards_of_a_partition_group_too(topology, rows):
    of_ranks = RowsOfRanks(topology)
    for owner in range(topology.world_size):
        matrix = OwnedMatrix(rows=rows, columns=2, owner=owner)
        ranks = range(topology.world_size)
        holders = [rank for rank in ranks if of_ranks.holds(rank, matrix)]
        assert owner in holders
        assert {topology.node_of(rank) for rank in holders} == {topology.node_of(owner)}
        held = [of_ranks.rows_of_slice(of_ranks.slice_of(rank), matrix) for rank in holders]
        assert list(chain.from_iterable(held)) == list(range(rows))
        shards = [of_ranks.own_rows(rank, matrix) for rank in topology.partition_group(owner)]
        assert list(chain.from_iterable(shards)) == list(range(rows))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_slices_are_the_shards_of_rails(topology):
    of_ranks, matrix = RowsOfRanks(topology), OwnedMatrix(rows=29, columns=1, owner=0)
    for rank in range(topology.world_size):
        rail = [of_ranks.own_rows(member, matrix) for member in topology.rail(rank)]
        assert list(chain.from_iterable(rail)) == list(of_ranks.rows_of_slice(of_ranks.slice_of(rank), matrix))


def iteration_flops(rows: int, columns: int) -> float:
    return MuonUpdate().flops(rows, columns, {"ns_steps": 5})


def gpt(layers: int, dim: int) -> list[tuple[int, int]]:
    return [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * layers


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "layers"), [(8, 2, 12), (12, 3, 12), (48, 8, 48), (96, 8, 96)]
)
def test_work_and_bytes_are_balanced(world_size, ranks_per_node, layers):
    topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=world_size)
    shapes = gpt(layers, 256)
    assert len(shapes) >= 4 * world_size
    loads, node_bytes = [0.0] * world_size, [0] * topology.nodes
    owners = choose_owners(
        [(iteration_flops(*shape), 4 * shape[0] * shape[1]) for shape in shapes], topology, loads, node_bytes
    )
    assert len(owners) == len(shapes)
    assert sum(loads) == sum(iteration_flops(*shape) for shape in shapes)
    assert max(loads) * world_size <= 1.15 * sum(loads)
    assert max(node_bytes) * topology.nodes <= 1.06 * sum(node_bytes)
    assert sum(node_bytes) == sum(4 * rows * columns for rows, columns in shapes)


def test_later_matrices_are_added_to_what_ranks_have():
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=4)
    loads, node_bytes = [0.0] * 4, [0, 0]
    first = choose_owners([(3.0, 1), (2.0, 1)], topology, loads, node_bytes)
    second = choose_owners([(1.0, 1), (1.0, 1), (1.0, 1)], topology, loads, node_bytes)
    assert not set(first) & set(second[:2])
    assert sum(loads) == 8.0
