"""Process groups and the device mesh of a topology."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_mics import Topology, create_partition_groups
from lightning_mics._torch import process_groups
from lightning_mics._torch.fake import rehearsed_job
from lightning_mics._torch.process_groups import all_gather_single
from lightning_mics.techniques import partition_groups
from tests.support.forked import run_ranks

KINDS = ("partition", "replication", "rail", "node")


@pytest.mark.parametrize("torch_keeps_order", [process_groups.KEEPS_ORDER, False], ids=["this torch", "before 2.13"])
@pytest.mark.parametrize("shape", [(8, 2, 4), (8, 4, 8), (4, 2, 2), (4, 2, 1)])
def test_every_rank_makes_the_groups_it_needs_and_no_others(shape, torch_keeps_order, monkeypatch):
    monkeypatch.setattr(process_groups, "KEEPS_ORDER", torch_keeps_order)
    topology = Topology(world_size=shape[0], ranks_per_node=shape[1], partition_size=shape[2])
    for rank, seen in enumerate(run_ranks(shape[0], _describe, topology)):
        assert seen["partition"] == topology.partition_group(rank)
        assert seen["replication"] == (topology.replication_group(rank) if topology.replicas > 1 else None)
        assert seen["rail"] == (topology.rail(rank) if topology.spans_nodes else None)
        assert seen["node"] == (topology.node_group(rank) if topology.spans_nodes else None)
        first_ranks = range(0, topology.world_size, topology.partition_size)
        assert seen["mesh"] == [list(topology.partition_group(first)) for first in first_ranks]
        assert seen["gathered"] == list(topology.partition_group(rank))
        assert seen["names"] == ("replicate", "shard")[-2 if topology.replicas > 1 else -1 :]
        needed = [seen[kind] for kind in KINDS if seen[kind] is not None]
        assert seen["backend"] == "gloo"
        assert seen["made"] == 2 + len(needed)  # and the world, twice: the control plane's is its own


def _describe(topology: Topology) -> dict[str, Any]:
    groups = create_partition_groups(topology, device_type="cpu")
    made = {kind: getattr(groups, kind) for kind in KINDS}
    gathered = torch.empty(groups.partition.size(), dtype=torch.int64)
    all_gather_single(gathered, torch.tensor([dist.get_rank()]), group=groups.partition)
    dist.barrier()  # a rank that ends early would break the connections of others
    mesh = groups.mesh.mesh if groups.mesh.ndim == 2 else groups.mesh.mesh[None]
    return {
        **{kind: group and tuple(dist.get_process_group_ranks(group)) for kind, group in made.items()},
        "mesh": mesh.tolist(),
        "gathered": gathered.tolist(),
        "names": groups.mesh.mesh_dim_names,
        "made": len(dist.distributed_c10d._world.pg_map),
        "backend": groups.backend,
    }


@pytest.mark.parametrize("torch_keeps_order", [process_groups.KEEPS_ORDER, False], ids=["this torch", "before 2.13"])
def test_the_timeout_reaches_every_group(torch_keeps_order, monkeypatch):
    monkeypatch.setattr(process_groups, "KEEPS_ORDER", torch_keeps_order)
    for timeouts in run_ranks(8, _timeouts):
        assert timeouts == [timedelta(seconds=77)] * 4


def _timeouts() -> list[timedelta]:
    topology = Topology(world_size=8, ranks_per_node=2, partition_size=4)
    groups = create_partition_groups(topology, device_type="cpu", timeout=timedelta(seconds=77))
    dist.barrier()
    mine = (groups.partition, groups.replication, groups.rail, groups.node)
    return [group._get_backend(groups.device).options._timeout for group in mine]


class Options:
    """NCCL's options of a group; torch has them where it was built for CUDA."""

    def __init__(self) -> None:
        self.config, self._timeout = SimpleNamespace(max_ctas=None), None


def test_blocks_of_threads_are_limited_for_rails_only(monkeypatch):
    made = {}

    def new_group(ranks, **options):
        made[options["group_desc"]] = options["pg_options"]
        return make(ranks, **{**options, "pg_options": None})

    make = dist.new_group
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_group", new_group)
    with rehearsed_job(world_size=8, rank=0):
        monkeypatch.setattr(partition_groups, "_check_job", lambda topology, device_type: "nccl")
        topology = Topology(world_size=8, ranks_per_node=2, partition_size=4)
        create_partition_groups(topology, device_type="cpu", rail_max_ctas=4, timeout=timedelta(seconds=77))
    assert made.pop("mics rail").config.max_ctas == 4
    assert set(made) >= {"mics replication", "mics node"}
    assert set(made.values()) == {None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, "rail_max_ctas=4 is an option of NCCL, and this job runs on fake"),
        (0, "neither None nor a positive integer"),
    ],
)
def test_a_limit_that_the_backend_does_not_have_is_rejected(value, message):
    with rehearsed_job(world_size=4, rank=0), pytest.raises(ValueError, match=message):
        create_partition_groups(
            Topology(world_size=4, ranks_per_node=2, partition_size=4), device_type="cpu", rail_max_ctas=value
        )
