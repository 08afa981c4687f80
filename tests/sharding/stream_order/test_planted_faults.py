"""The simulation of streams finds faults that are planted in this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_mics._torch import streams
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.techniques import two_hop
from lightning_mics.techniques.cache_offload import HeldOnHost, HostCopies
from lightning_mics.techniques.hierarchical import HierarchicalReduceScatter
from lightning_mics.techniques.inter_node_prefetch import FetchedSlice, UnitPrefetch
from lightning_mics.techniques.pending_gradients import PendingGradients
from tests.support.stream_order import simulation
from tests.support.stream_order.jobs import Findings, Job, run_usage, simulated_job, train

simulation.COUNT_AS_PACKAGE.add(__file__)
CPU = torch.device("cpu")
TWO_STAGES = ("two stages", "node cache and sums")


class Plant:
    """Functions of this package replaced by faulty ones, which count their calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.calls = 0

    def replace(self, owner: Any, name: str, faulty: Callable[..., Any]) -> None:
        """Replace a function; the faulty one is called with the original before the arguments."""
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return faulty(original, *args, **kwargs)

        self._patch.setattr(owner, name, counted)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    return Plant(monkeypatch)


def found_in(plant: Plant, options: str, precision: str, run: Callable[[Job], None] = train) -> Findings:
    """What training does wrong with the planted fault."""
    with simulated_job(options, precision) as job:
        found = run_usage(job, run)
    assert plant.calls, "the planted fault was not executed"
    return found


@pytest.mark.parametrize("options", ["inside a node, wire dtype", "two stages, wire dtype", "rank cache, wire dtype"])
def test_no_record_stream_in_the_second_hop(plant: Plant, options: str) -> None:
    plant.replace(two_hop, "keep_for_current_stream", lambda _original, _tensor: None)
    found = found_in(plant, options, "bf16-true")
    assert found.order and all(each.startswith("reused") for each in found.order)


@pytest.mark.parametrize("options", ["node cache and sums", "one rank a node, node cache and sums"])
def test_sums_on_the_wrong_stream(plant: Plant, options: str) -> None:
    def on_another(original: Any, *args: Any) -> Any:
        with streams.on_stream(streams.new_stream(CPU), CPU):
            return original(*args)

    plant.replace(PendingGradients, "accumulate", on_another)
    assert any(each.startswith("race") for each in found_in(plant, options, "32-true").order)


@pytest.mark.parametrize("options", ["two stages", "node cache and sums", "one rank a node"])
def test_a_rail_stage_in_no_order(plant: Plant, options: str) -> None:
    def beside(original: Any, *args: Any, technique: str, **kwargs: Any) -> Any:
        if technique != "gather along rails":
            plant.calls -= 1
            return original(*args, technique=technique, **kwargs)
        with streams.on_stream(streams.new_stream(CPU), CPU):
            return original(*args, technique=technique, **kwargs)

    plant.replace(CountedGroup, "all_gather", beside)
    assert any(each.startswith("race") for each in found_in(plant, options, "bf16-mixed").order)


@pytest.mark.parametrize("options", TWO_STAGES)
@pytest.mark.parametrize("wait", ["item", "cpu", "synchronize"])
def test_a_wait_of_the_host(plant: Plant, options: str, wait: str) -> None:
    def waiting(original: Any, self: Any, rail_slice: Any, *args: Any, **kwargs: Any) -> Any:
        if wait == "item":
            rail_slice[0].item()
        elif wait == "cpu":
            rail_slice.cpu()
        else:
            streams.current_stream(CPU).synchronize()
        return original(self, rail_slice, *args, **kwargs)

    plant.replace(HierarchicalReduceScatter, "reduce_along_rail", waiting)
    assert any("waiting" in each for each in found_in(plant, options, "32-true").waits)


@pytest.mark.parametrize("options", ["flat", "rank cache and sums"])
def test_a_wait_for_the_whole_device(plant: Plant, options: str) -> None:
    def waiting(original: Any, self: Any) -> None:
        torch.cpu.synchronize()
        original(self)

    plant.replace(AccumulationWindow, "_close", waiting)
    assert any("waiting" in each for each in found_in(plant, options, "32-true").waits)


@pytest.mark.parametrize("options", TWO_STAGES)
def test_a_buffer_freed_too_early(plant: Plant, options: str) -> None:
    def through_a_copy(original: Any, self: Any, unsharded: Any, *args: Any) -> Any:
        current, other = streams.current_stream(CPU), streams.new_stream(CPU)
        with streams.on_stream(other, CPU):
            copy = torch.empty_like(unsharded)
        current.wait_stream(other)
        unsharded.copy_(copy.copy_(unsharded))
        del copy
        with streams.on_stream(other, CPU):
            torch.zeros_like(unsharded)
        return original(self, unsharded, *args)

    plant.replace(HierarchicalReduceScatter, "reduce_in_node", through_a_copy)
    found = found_in(plant, options, "32-true")
    assert any(each.startswith("reused") for each in found.order)


def three_steps(job: Job) -> None:
    for _ in range(3):
        job.window(micro_steps=1)


AHEAD = [f"{name}, one ahead" for name in (*TWO_STAGES, "rank cache", "one rank a node")]


@pytest.mark.parametrize("options", AHEAD)
def test_units_that_are_fetched_ahead_without_a_fault(plant: Plant, options: str) -> None:
    plant.replace(UnitPrefetch, "_fetch", lambda original, *args: original(*args))
    assert found_in(plant, options, "bf16-mixed", three_steps) == Findings(order=(), waits=())


@pytest.mark.parametrize("options", AHEAD)
def test_a_gather_that_does_not_wait_for_what_was_fetched_for_it(plant: Plant, options: str) -> None:
    def beside(original: Any, self: Any, inputs: Any, first_stage: Any, device: Any) -> Any:
        arrived = first_stage.record()
        with streams.on_stream(streams.new_stream(CPU), CPU):
            streams.current_stream(CPU).wait_event(arrived)
            return replace(original(self, inputs, first_stage, device), arrived=arrived)

    plant.replace(UnitPrefetch, "_fetch", beside)
    assert any(each.startswith("race") for each in found_in(plant, options, "32-true", three_steps).order)


def test_a_unit_in_memory_that_is_still_being_fetched(plant: Plant) -> None:
    plant.replace(FetchedSlice, "wait", lambda _original, _fetched: None)
    found = found_in(plant, "one rank a node, one ahead", "32-true", three_steps)
    assert any(each.startswith("race") for each in found.order)


ON_HOST = ("node cache and sums, on the host", "one rank a node, node cache and sums, on the host")


def four_windows(job: Job) -> None:
    for _ in range(4):
        job.window()


@pytest.mark.parametrize("options", ON_HOST)
def test_caches_and_sums_on_the_host_without_a_fault(plant: Plant, options: str) -> None:
    ahead = []

    def counted(original: Any, self: HeldOnHost) -> Any:
        ahead.append(self._fetched is not None)
        return original(self)

    plant.replace(HeldOnHost, "take", counted)
    assert found_in(plant, options, "bf16-mixed", four_windows) == Findings(order=(), waits=())
    assert ahead.count(True) > ahead.count(False) > 0  # both ways are ordered


@pytest.mark.parametrize("options", ON_HOST)
@pytest.mark.parametrize("part", ["take", "put"])
def test_a_copy_from_or_to_the_host_that_nothing_waits_for(plant: Plant, options: str, part: str) -> None:
    def beside(original: Any, *args: Any) -> Any:
        with streams.on_stream(streams.new_stream(CPU), CPU):
            return original(*args)

    plant.replace(HeldOnHost, part, beside)
    assert any(each.startswith("race") for each in found_in(plant, options, "32-true", four_windows).order)


@pytest.mark.parametrize("options", ON_HOST)
def test_memory_of_a_slice_that_is_used_again_before_its_last_use_is_over(plant: Plant, options: str) -> None:
    plant.replace(HostCopies, "leave", lambda original, self, values, _over: original(self, values, []))
    assert any(each.startswith("reused") for each in found_in(plant, options, "32-true", four_windows).order)


def test_a_fault_that_is_not_executed_fails(plant: Plant) -> None:
    plant.replace(PendingGradients, "accumulate", lambda original, *args: original(*args))
    with pytest.raises(AssertionError, match="not executed"):
        found_in(plant, "flat", "32-true")
