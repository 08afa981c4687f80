"""The closed form of a step's memory is what a rehearsal of the step allocates, and never less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.step_memory import compared, ratio
from lightning_mics.policy.step_memory import step_bytes
from lightning_mics.sharding.optimizers.offload import Offload
from tests.support.campaign import campaign
from tests.support.jobs import JOBS, SEQUENCES, measured, rehearsed

pytestmark = pytest.mark.rehearsal


@pytest.mark.parametrize(
    ("job", "micro_steps"),
    [
        ("one rank a group", 1),
        campaign("a node a group", 1),  # as in half precision
        ("without two hops", 2),
        campaign("a node a group, once per step", 3),  # as everywhere
        campaign("hierarchical", 3),  # as with replicas, half of the bytes
        campaign("once per step", 2),  # as with replicas over nodes
        ("once per step everywhere", 1),
        ("replicas over nodes", 3),
        ("replicas, half of the bytes", 2),
        ("recomputed", 1),
        ("mixed precision", 3),
        ("half precision", 2),
        ("hierarchical, fetched ahead", 4),
        ("flat, parameters once per step", 3),
        ("once per step, on the host", 3),
        campaign("once per step, on the host", 1),  # sums of one micro-step are nowhere, as with parameters alone
        ("parameters once per step, on the host", 1),
        ("mixed precision, on the host", 3),
        ("half of the blocks, on the host", 3),
    ],
)
def test_a_step_takes_what_its_rehearsal_allocates_however_it_runs(job: str, micro_steps: int) -> None:
    facts = JOBS[job]
    workload = measured("bert", facts)
    closed = step_bytes(workload, facts.topology, facts.communication, samples=SEQUENCES, micro_steps=micro_steps)
    real = rehearsed("bert", facts, backend="nccl", micro_steps=micro_steps).peak_bytes
    assert real <= closed <= 1.02 * real


OFFLOADED: list[tuple[str, int, Offload]] = [
    ("a node a group", 1, "optimizer"),
    ("replicas over nodes", 3, "optimizer"),
    ("one rank a group", 1, True),
    ("a node a group", 3, True),
    ("without two hops", 3, True),
    ("hierarchical", 1, True),
    ("a node a group, once per step", 1, True),
    ("once per step everywhere", 1, True),
    ("replicas, half of the bytes", 2, True),
    ("mixed precision", 3, True),
    ("half precision", 1, True),
]


@pytest.mark.parametrize(("job", "micro_steps", "offload"), OFFLOADED)
def test_a_step_with_states_on_the_host_takes_what_its_rehearsal_allocates(
    job: str, micro_steps: int, offload: Offload
) -> None:
    facts = replace(JOBS[job], offload=offload)
    workload = measured("bert", facts)
    closed = step_bytes(workload, facts.topology, facts.communication, samples=SEQUENCES, micro_steps=micro_steps)
    real = rehearsed("bert", facts, backend="nccl", micro_steps=micro_steps).peak_bytes
    assert real <= closed <= 1.03 * real


@pytest.mark.parametrize(
    ("job", "share", "micro_steps"),
    [
        ("once per step", 0.0, 3),
        ("once per step", 0.5, 3),
        ("a node a group", 0.17, 1),
        ("half precision", 0.5, 2),
        ("flat, parameters once per step", 0.0, 3),
        campaign("once per step everywhere", 0.0, 3),
        campaign("once per step", 0.17, 1),
        campaign("once per step", 0.84, 3),
        campaign("a node a group", 0.34, 3),
        campaign("a node a group", 1.0, 1),
        campaign("recomputed", 0.5, 1),
        campaign("mixed precision", 0.5, 3),
    ],
)
def test_a_step_with_frozen_weights_on_ranks_takes_what_its_rehearsal_allocates(
    job: str, share: float, micro_steps: int
) -> None:
    facts = replace(JOBS[job], communication=replace(JOBS[job].communication, frozen_on_ranks=share))
    workload = measured("gpt with adapters", facts)
    closed = step_bytes(workload, facts.topology, facts.communication, samples=SEQUENCES, micro_steps=micro_steps)
    real = rehearsed("gpt with adapters", facts, backend="nccl", micro_steps=micro_steps).peak_bytes
    assert real <= closed <= 1.03 * real


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("gpt2", ["model.network.n_layer=5"]),
        campaign("gpt-tiny", ["model.network.num_hidden_layers=7"], id="gpt-tiny"),
        (
            "bert-tiny",
            [
                "model.network.num_hidden_layers=7",
                "strategy.activation_checkpointing=true",
                "strategy.activation_offload=true",
            ],
        ),
        ("gpt2", ["model.network.n_layer=5", "strategy.offload=true"]),
        (
            "gpt-tiny",
            [
                "model.network.num_hidden_layers=7",
                "strategy.partition_size=16",
                "strategy.cache_parameters=node",
                "strategy.accumulate_gradients=node",
                "strategy.cache_offload=true",
            ],
        ),
    ],
    ids=["gpt2", None, "inputs on the host", "all on the host", "caches on the host"],
)
def test_a_plan_counts_the_memory_of_three_micro_batches_within_three_percent(model: str, overrides: list[str]) -> None:
    rows = list(compared(model, "p4d_2", *overrides))
    assert len(rows) == 3
    for row in rows:
        assert 1 <= ratio(row) <= 1.03, row


def test_a_plan_counts_one_sequence_with_as_many_tokens_as_positions_are_learned() -> None:
    (row,) = compared("gpt2", "p4d_2", "model.network.n_layer=5", "data.batch_size=1", rehearsals=1)
    assert 1 <= ratio(row) <= 1.001, row
