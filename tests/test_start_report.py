"""The table at start says what was chosen and why."""

from __future__ import annotations

import pytest
import torch

from lightning_mics.start_report import start_report
from lightning_mics.topology import Topology

GIB = 2**30


def report(world: int, k: int, p: int, *, staged: bool = False, automatic: bool = False, states: int = GIB) -> str:
    topology = Topology(world_size=world, ranks_per_node=k, partition_size=p)
    return start_report(
        topology,
        chosen_automatically=automatic,
        hierarchical=staged,
        reduce_dtype=torch.bfloat16,
        states_bytes=states,
        capacity_bytes=4 * GIB,
        fits=states <= 3 * GIB,
    )


def test_the_table_names_groups_techniques_and_memory():
    assert report(16, 4, 8, staged=True, automatic=True).splitlines() == [
        "MiCS",
        "  ranks               16 on 4 nodes",
        '  partition groups    2 of 8 ranks ("auto": the fewest whole nodes that hold the model states)',
        "  replication groups  8 of 2 ranks",
        "  hierarchical        on: a partition group spans 2 nodes",
        "  two-hop             on: gradients cross replicas at the boundary only",
        "  gradients           reduced, and summed over micro-steps, in bfloat16",
        "  model states        about 1 GiB of 4 GiB per rank (Adam; no activations)",
    ]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((8, 4, 4), "off: a partition group is inside one node"),
        ((8, 1, 4), "off: one rank per node, so there is no second stage"),
        ((8, 4, 8), "off: hierarchical=False"),
    ],
)
def test_flat_collectives_have_a_reason(shape, reason):
    assert f"hierarchical        {reason}\n" in report(*shape)


def test_without_replicas_there_is_no_second_hop():
    assert "two-hop             off: there is one replica only" in report(8, 4, 8)


def test_states_that_exceed_the_device_or_fill_it_are_warned_of():
    assert "the model states alone exceed the device" in report(8, 4, 8, states=5 * GIB)
    assert "leave little of the device" in report(8, 4, 8, states=4 * GIB)
    assert '("auto": all, and they hardly hold the model states)' in report(8, 4, 8, states=4 * GIB, automatic=True)
    assert "warning" not in report(8, 4, 8)
