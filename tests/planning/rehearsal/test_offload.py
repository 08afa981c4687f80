"""What model states in host memory leave on the device, in rehearsals of AdamW in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mics.planning.rehearsal.rehearse import GRADIENTS, PARAMETERS, STATES, Rehearsal
from lightning_mics.sharding.optimizers.offload import Offload
from tests.support.jobs import JOBS, measured, rehearsed

pytestmark = pytest.mark.rehearsal

WEIGHT = GRADIENT = 4  # bytes of a parameter
MOMENTS, COUNTER = 8, 4  # bytes of a parameter, and of a tensor of parameters


def rehearsal(job: str, *, offload: Offload, micro_steps: int = 1) -> Rehearsal:
    return rehearsed("bert", replace(JOBS[job], offload=offload), micro_steps=micro_steps, backend="nccl")


def elements_of_shards(job: str) -> tuple[int, int]:
    """Elements of the shards of a rank with padding, and number of tensors."""
    facts = JOBS[job]
    work = measured("bert", facts)
    ranks = facts.topology.partition_size
    return work.elements(ranks).total // ranks, work.parameter_tensors


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("job", ["one rank a group", "a node a group", "hierarchical", "once per step everywhere"])
def test_the_peak_falls_by_the_states_of_the_optimizer_alone(job: str, micro_steps: int) -> None:
    elements, tensors = elements_of_shards(job)
    on_device, on_host = (rehearsal(job, offload=o, micro_steps=micro_steps) for o in (False, "optimizer"))
    moved = MOMENTS * elements + COUNTER * tensors
    assert on_host.on_host_bytes == on_device.states[STATES] == moved > 0
    assert on_device.on_host_bytes == 0
    assert on_device.peak_bytes - on_host.peak_bytes == moved
    assert on_host.states == {**on_device.states, STATES: 0}
    assert on_host.sent() == on_device.sent()


@pytest.mark.parametrize("job", ["one rank a group", "a node a group", "hierarchical", "once per step everywhere"])
def test_weights_gradients_and_states_leave_nothing_of_shards_on_the_device(job: str) -> None:
    elements, tensors = elements_of_shards(job)
    on_device, on_host = (rehearsal(job, offload=offload) for offload in (False, True))
    moved = (WEIGHT + GRADIENT + MOMENTS) * elements + COUNTER * tensors
    assert on_host.on_host_bytes == moved
    assert sum(on_device.states.values()) - sum(on_host.states.values()) == moved
    buffers = on_device.states[PARAMETERS] - WEIGHT * elements
    assert on_host.states == {PARAMETERS: buffers, GRADIENTS: 0, STATES: 0}
    assert on_host.sent() == on_device.sent()


def test_the_peak_falls_by_all_that_is_there_but_gradients_on_their_way() -> None:
    elements, tensors = elements_of_shards("hierarchical")
    on_device, on_host = (rehearsal("hierarchical", offload=offload) for offload in (False, True))
    less = on_device.peak_bytes - on_host.peak_bytes
    assert less >= (WEIGHT + MOMENTS) * elements + COUNTER * tensors
    assert less <= (WEIGHT + GRADIENT + MOMENTS) * elements + COUNTER * tensors


def test_sums_that_wait_for_the_second_hop_stay_on_the_device() -> None:
    elements, _ = elements_of_shards("a node a group")
    once, thrice = (rehearsal("a node a group", offload=True, micro_steps=count) for count in (1, 3))
    assert once.states[GRADIENTS] == thrice.states[GRADIENTS] == 0  # after the boundary
    assert thrice.peak[GRADIENTS] == GRADIENT * elements
    assert once.peak.get(GRADIENTS, 0) < GRADIENT * elements
