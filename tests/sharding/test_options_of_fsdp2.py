"""FSDP2's own options of communication on a sharded model: they hold, or name what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics._torch.fake import rehearsed_job
from lightning_mics.sharding.schedule import AccumulationSchedule


@contextmanager
def sharded(ranks_per_node: int) -> Iterator[tuple[nn.Module, AccumulationSchedule]]:
    """One of four ranks that hold one replica."""
    with rehearsed_job(world_size=4, rank=0):
        topology = Topology(world_size=4, ranks_per_node=ranks_per_node, partition_size=4)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
        schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), block_classes=[nn.Linear])
        yield model, schedule


def step(model: nn.Module, schedule: AccumulationSchedule) -> None:
    with schedule.micro_step(boundary=True):
        model(torch.ones(2, 8)).sum().backward()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dist.ProcessGroup]]:
    """The collectives that FSDP2's own objects run, and their groups."""
    seen = []
    for name in (
        "DefaultAllGather",
        "DefaultReduceScatter",
        "ProcessGroupAllocAllGather",
        "ProcessGroupAllocReduceScatter",
    ):
        own = getattr(_fsdp_collectives, name)

        def call(self, *args, group, _inner=own.__call__, _name=name, **kwargs):
            seen.append((_name, group))
            return _inner(self, *args, group=group, **kwargs)

        monkeypatch.setattr(own, "__call__", call)
    return seen


def test_flat_collectives_are_fsdp2s_own_and_counted(calls):
    with sharded(ranks_per_node=4) as (model, schedule):
        step(model, schedule)
        assert {name for name, _ in calls} == {"DefaultAllGather", "DefaultReduceScatter"}
        assert schedule.traffic.by_technique().keys() == {"gather in partition groups", "reduce in partition groups"}


def test_memory_of_the_process_group_holds_where_collectives_are_flat(calls):
    with sharded(ranks_per_node=4) as (model, schedule):
        for unit in model:
            unit.set_allocate_memory_from_process_group_for_comm(True)
        step(model, schedule)
        assert {name for name, _ in calls} == {"ProcessGroupAllocAllGather", "ProcessGroupAllocReduceScatter"}
        assert schedule.traffic.by_technique().keys() == {"gather in partition groups", "reduce in partition groups"}
        calls.clear()
        for unit in model:
            unit.set_allocate_memory_from_process_group_for_comm(False)
        step(model, schedule)
        assert {name for name, _ in calls} == {"DefaultAllGather", "DefaultReduceScatter"}


@pytest.mark.skipif(not hasattr(_fsdp_collectives, "SymmMemAllGather"), reason="FSDP2 has it since torch 2.13")
def test_symmetric_memory_holds_where_collectives_are_flat(monkeypatch, calls):
    class SymmetricAllGather(_fsdp_collectives.DefaultAllGather):
        def __init__(self, group, backend) -> None:
            made.append(group)

    made = []
    monkeypatch.setattr(_fsdp_param_group, "SymmMemAllGather", SymmetricAllGather)
    with sharded(ranks_per_node=4) as (model, schedule):
        model[0].set_symm_mem_for_comm()
        assert len(made) == 1
        step(model, schedule)
        assert schedule.traffic.by_technique().keys() == {"gather in partition groups", "reduce in partition groups"}


@pytest.mark.skipif(not hasattr(_fsdp_param_group.FSDPParamGroup, "_set_separate_reduce_scatter_group"), reason="2.13")
def test_reductions_run_on_a_group_of_their_own_on_request(calls):
    with sharded(ranks_per_node=4) as (model, schedule):
        model.set_separate_reduce_scatter_group(True)
        step(model, schedule)
        gathers = {group for name, group in calls if name == "DefaultAllGather"}
        reductions = {group for name, group in calls if name == "DefaultReduceScatter"}
        assert len(gathers) == len(reductions) == 1
        assert gathers.isdisjoint(reductions)


@pytest.mark.parametrize(
    ("option", "on", "off"),
    [
        ("set_allocate_memory_from_process_group_for_comm", (True,), (False,)),
        ("set_symm_mem_for_comm", (), None),
        ("set_separate_reduce_scatter_group", (True,), (False,)),
    ],
)
def test_two_stages_reject_options_of_fsdp2s_own_collectives_by_name(option, on, off):
    with sharded(ranks_per_node=2) as (model, schedule):
        if not hasattr(model, option):
            pytest.skip("FSDP2 has it since torch 2.13")
        with pytest.raises(RuntimeError, match=rf"^{option} is for FSDP2's own .* hierarchical=False"):
            getattr(model[0], option)(*on)
        if off is not None:
            getattr(model[0], option)(*off)
        step(model, schedule)
        assert "gather along rails" in schedule.traffic.by_technique()
