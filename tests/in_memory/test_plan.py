"""Every byte is on two nodes, and what is sent goes to a node of another partition group."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from lightning_mics.in_memory.plan import Holders, Plan, blob_capacity
from lightning_mics.in_memory.table import StoredRows, decoded, encoded, joined, split
from lightning_mics.topology import Topology, partition_sizes

TOPOLOGIES = [
    Topology(world_size=world, ranks_per_node=local, partition_size=size)
    for world in (2, 4, 8, 16)
    for local in (1, 2, 4, 8)
    if world % local == 0 and world > local
    for size in partition_sizes(world_size=world, ranks_per_node=local)
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.nodes}x{t.ranks_per_node}p{t.partition_size}")
def test_every_part_is_on_two_nodes(topology: Topology) -> None:
    nodes: dict[tuple[str, int], set[int]] = defaultdict(set)
    for rank in range(topology.world_size):
        plan, node = Plan(rank=rank, topology=topology), topology.node_of(rank)
        target = (node + Holders.of(topology).node_offset) % topology.nodes
        for kind, of_rank in plan.keys:
            nodes[kind, of_rank].add(node)
            if kind == "rows":  # of a rank that holds the same shard
                assert of_rank in topology.replication_group(rank)
        for key in [("private", rank), *plan.forwarded]:
            nodes[key].add(target)
        if topology.replicas > 1 and topology.nodes_per_partition_group != topology.nodes:
            here = {topology.node_of(member) for member in topology.partition_group(rank)}
            assert target not in here
    assert set(nodes) == {(kind, rank) for kind in ("private", "rows") for rank in range(topology.world_size)}
    assert all(len(found) == 2 for found in nodes.values()), nodes


@pytest.mark.parametrize("local", [1, 4])
def test_one_node_has_no_second_holder(local: int) -> None:
    holders = Holders.of(Topology(world_size=local, ranks_per_node=local, partition_size=local))
    assert (holders.replica_offset, holders.node_offset) == (0, 0)


def test_rows_are_sent_only_where_there_is_one_replica() -> None:
    one = Plan(rank=2, topology=Topology(world_size=4, ranks_per_node=2, partition_size=4))
    two = Plan(rank=2, topology=Topology(world_size=4, ranks_per_node=2, partition_size=2))
    assert one.forwarded == [("rows", 2)]
    assert two.forwarded == []
    assert two.keys == [("private", 2), ("rows", 2), ("rows", 0)]


def test_a_table_says_where_each_tensor_is() -> None:
    places = [
        StoredRows("model.a", ("model", "a"), (4, 0), (2, 3), (8, 3), torch.bfloat16, 0),
        StoredRows("optimizer_0.state.a.step", ("optimizer_0", "state", "a", "step"), (), (), (), torch.float32, 64),
    ]
    assert decoded(encoded(places)) == places
    assert [place.size_bytes for place in places] == [12, 4]


@pytest.mark.parametrize("table", [b"", b"x", encoded([])[:-2], b"x\x9c" + b"\0" * 8])
def test_what_is_no_table_is_rejected(table: bytes) -> None:
    with pytest.raises(ValueError, match="not a table"):
        decoded(table)


def test_a_blob_has_room_to_grow() -> None:
    assert [blob_capacity(size) for size in (0, 1, 2**16, 2**16 + 1)] == [0, 2**16, 2**16, 2**17]


def test_pickled_parts_come_apart_again() -> None:
    assert split(joined(b"objects", b"meta")) == (b"objects", b"meta")
