"""Process groups and the device mesh of a topology."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_mics import Topology, _torch_compat, create_groups
from tests.forked import run_ranks


@pytest.mark.parametrize("shape", [(8, 2, 4), (8, 4, 8), (4, 2, 2), (4, 2, 1)])
def test_every_rank_gets_its_own_four_groups_in_rail_order(shape):
    topology = Topology(world_size=shape[0], ranks_per_node=shape[1], partition_size=shape[2])
    for rank, seen in enumerate(run_ranks(shape[0], _describe, topology)):
        assert seen["partition"] == topology.partition_group(rank)
        assert seen["replication"] == topology.replication_group(rank)
        assert seen["rail"] == topology.rail(rank)
        assert seen["node"] == topology.node_group(rank)
        first_ranks = range(0, topology.world_size, topology.partition_size)
        assert seen["mesh"] == [list(topology.partition_group(first)) for first in first_ranks]
        assert seen["names"] == ("replicate", "shard")[-2 if topology.replicas > 1 else -1 :]
        assert seen["made"] == 5  # these four and the world, however many groups there are


def _describe(topology: Topology) -> dict[str, Any]:
    groups = create_groups(topology, device_type="cpu")
    kinds = ("partition", "replication", "rail", "node")
    mesh = groups.mesh.mesh if groups.mesh.ndim == 2 else groups.mesh.mesh[None]
    return {
        **{kind: tuple(dist.get_process_group_ranks(getattr(groups, kind))) for kind in kinds},
        "mesh": mesh.tolist(),
        "names": groups.mesh.mesh_dim_names,
        "made": len(dist.distributed_c10d._world.pg_map),
    }


def test_the_timeout_reaches_every_group():
    for timeouts in run_ranks(4, _timeouts):
        assert timeouts == [timedelta(seconds=77)] * 4


def _timeouts() -> list[timedelta]:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=2)
    groups = create_groups(topology, device_type="cpu", timeout=timedelta(seconds=77))
    mine = (groups.partition, groups.replication, groups.rail, groups.node)
    return [group._get_backend(groups.device).options._timeout for group in mine]


def test_groups_that_span_nodes_say_which_torch_they_need(monkeypatch):
    monkeypatch.setattr(_torch_compat, "HAS_UNSORTED_GROUPS", False)
    with pytest.raises(RuntimeError, match=r"a partition group that spans nodes needs torch >= 2\.13, this is torch"):
        _torch_compat.new_group((0, 2, 1, 3), timeout=None)
