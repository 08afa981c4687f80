"""The table at start says what was chosen and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lightning_mics.policy.once_per_step import Choice, OncePerStep
from lightning_mics.policy.start_report import start_report
from lightning_mics.topology import Topology

GIB = 2**30


EVERY = Choice(once=False, why='"auto": a rank does not hold the whole model states')


ONCE = OncePerStep(
    cross_node_gather=Choice(once=True, why="for 1 GiB per rank", kept_bytes=GIB),
    cross_node_reduce=Choice(once=True, why='"auto": 2 GiB of 3 GiB', kept_bytes=2 * GIB),
    in_node_gather=EVERY,
    in_node_reduce=EVERY,
)


ALWAYS = replace(
    ONCE,
    cross_node_gather=Choice(once=False, why="would take 1 GiB per rank"),
    cross_node_reduce=Choice(once=False, why="collectives are flat"),
)


def report(
    world: int,
    k: int,
    p: int,
    *,
    staged: bool = False,
    automatic: bool = False,
    states: int = GIB,
    once_per_step: OncePerStep = ONCE,
    two_hop: bool = True,
    wire: torch.dtype | None = None,
) -> str:
    topology = Topology(world_size=world, ranks_per_node=k, partition_size=p)
    return start_report(
        topology,
        chosen_automatically=automatic,
        hierarchical=staged,
        once_per_step=once_per_step,
        two_hop=two_hop,
        inter_node_reduce_dtype=wire,
        reduce_dtype=torch.bfloat16,
        states_bytes=states,
        capacity_bytes=4 * GIB,
        fits=states <= 3 * GIB,
    )


def test_the_table_names_groups_techniques_and_memory():
    assert report(16, 4, 8, staged=True, automatic=True).splitlines() == [
        "MiCS",
        "  ranks                   16 on 4 nodes",
        '  partition groups        2 of 8 ranks ("auto": the fewest whole nodes that hold the model states)',
        "  replication groups      8 of 2 ranks",
        "  hierarchical            on: a partition group spans 2 nodes",
        "  two-hop                 on: gradients cross replicas at the boundary only",
        "  gradients               reduced, and summed over micro-steps, in bfloat16",
        '  parameters in nodes     at every use ("auto": a rank does not hold the whole model states)',
        '  gradients in nodes      in every micro-step ("auto": a rank does not hold the whole model states)',
        "  parameters cross nodes  once per step (for 1 GiB per rank)",
        '  gradients cross nodes   once per step ("auto": 2 GiB of 3 GiB)',
        "  model states            about 1 GiB of 4 GiB per rank (Adam; no activations)",
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
    assert re.search(rf"hierarchical +{re.escape(reason)}\n", report(*shape))


def test_crossing_nodes_more_often_has_a_reason():
    rows = report(8, 4, 8, once_per_step=ALWAYS, wire=torch.float16)
    assert "parameters cross nodes  at every use (would take 1 GiB per rank)\n" in rows
    assert "gradients cross nodes   in every micro-step (collectives are flat), as float16\n" in rows


def test_partition_groups_inside_nodes_leave_the_second_hop_to_cross():
    inside = replace(ALWAYS, cross_node_gather=Choice(once=False, why="a partition group is inside one node"))
    rows = report(8, 4, 4, once_per_step=inside)
    assert "parameters cross nodes  never: a partition group is inside one node\n" in rows
    assert "gradients cross nodes   once per step: by the second hop\n" in rows


def test_on_one_node_nothing_crosses():
    assert "cross nodes" not in report(4, 4, 2)


def test_a_partition_group_of_one_rank_has_no_traffic_of_its_own():
    assert "in nodes" not in report(8, 4, 1)


def test_without_replicas_there_is_no_second_hop():
    assert re.search("two-hop +off: there is one replica only", report(8, 4, 8))


def test_states_that_exceed_the_device_or_fill_it_are_warned_of():
    assert "the model states alone exceed the device" in report(8, 4, 8, states=5 * GIB)
    assert "leave little of the device" in report(8, 4, 8, states=4 * GIB)
    assert '("auto": all, and they hardly hold the model states)' in report(8, 4, 8, states=4 * GIB, automatic=True)
    assert "warning" not in report(8, 4, 8)


def test_hops_that_are_not_two_are_named():
    rows = report(8, 4, 4, once_per_step=ALWAYS, two_hop=False)
    assert "two-hop                 off: two_hop=False, so gradients cross replicas in every micro-step\n" in rows
    assert "gradients cross nodes   in every micro-step: by the second hop\n" in rows
