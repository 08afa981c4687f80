"""The simulation of streams, on programs of a few operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_mics._torch.fake import rehearsed_job
from lightning_mics._torch.process_groups import all_gather_single
from tests.support.stream_order.simulation import Simulation, simulated_streams


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    with rehearsed_job(world_size=2, rank=0), simulated_streams() as simulated:
        yield simulated


def kinds(simulation: Simulation) -> set[str]:
    return {problem.kind.split()[0] for problem in simulation.problems}


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_in_order_if_one_waits_for_the_other(simulation: Simulation, waits: bool) -> None:
    values, side = torch.ones(4), torch.cpu.Stream()
    if waits:
        side.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(side):
        values.add_(1)
    assert kinds(simulation) == (set() if waits else {"race:"})


def test_parts_of_a_tensor_may_be_used_in_no_order(simulation: Simulation) -> None:
    values, side = torch.ones(4), torch.cpu.Stream()
    side.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(side):
        values[:2].add_(1)
    values[2:].add_(1)
    assert not simulation.problems
    values[1:].add_(1)
    assert kinds(simulation) == {"race:"}


def test_an_event_covers_what_was_enqueued_before_it(simulation: Simulation) -> None:
    side = torch.cpu.Stream()
    with torch.cpu.stream(side):
        early = torch.ones(4)
        event = side.record_event()
        late = torch.ones(4)
    event.wait()
    early.sum()
    assert not simulation.problems
    late.sum()
    assert kinds(simulation) == {"race:"}


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_reused_too_early_unless_its_use_is_recorded(simulation: Simulation, recorded: bool) -> None:
    values, side = torch.ones(4), torch.cpu.Stream()
    side.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(side):
        values.sum()
    if recorded:
        values.record_stream(side)
    del values
    torch.ones(4)
    assert kinds(simulation) == (set() if recorded else {"reused"})


def test_memory_that_is_resized_is_freed_and_allocated(simulation: Simulation) -> None:
    values, side = torch.ones(4), torch.cpu.Stream()
    side.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(side):
        values.sum()
    values.untyped_storage().resize_(0)
    values.untyped_storage().resize_(16)
    assert kinds(simulation) == {"reused"}


@pytest.mark.parametrize("waits", [True, False])
def test_the_result_of_an_asynchronous_collective_is_there_after_its_wait(simulation: Simulation, waits: bool) -> None:
    output, shard = torch.ones(4), torch.ones(2)
    work = all_gather_single(output, shard, async_op=True)
    if waits:
        work.wait()
    output.sum()
    assert kinds(simulation) == (set() if waits else {"race:"})


def test_a_synchronous_collective_runs_on_the_current_stream(simulation: Simulation) -> None:
    output, shard = torch.ones(4), torch.ones(2)
    all_gather_single(output, shard)
    output.sum()
    assert not simulation.problems and not simulation.waits


@pytest.mark.parametrize("method", ["item", "cpu", "tolist", "numpy", "__bool__", "__float__"])
def test_the_host_waits_for_a_value(simulation: Simulation, method: str) -> None:
    value = torch.ones(())
    assert not simulation.waits
    getattr(value, method)()
    assert sum(simulation.waits.values()) == 1


def test_what_the_host_has_waited_for_is_over(simulation: Simulation) -> None:
    side = torch.cpu.Stream()
    with torch.cpu.stream(side):
        values = torch.ones(4)
    side.synchronize()
    values.sum()
    assert not simulation.problems
    assert sum(simulation.waits.values()) == 1


def test_launches_are_counted_without_views(simulation: Simulation) -> None:
    torch.ones(4).view(2, 2).add_(1)
    assert {name: count for (_, name), count in simulation.launches.items()} == {"aten.ones": 1, "aten.add_": 1}
