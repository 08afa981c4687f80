"""The table at start says what was chosen and why."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from lightning_mics import CommunicationOptions
from lightning_mics.policy.choice import ShardingJob, choose
from lightning_mics.policy.memory import ModelSize
from lightning_mics.policy.start_report import start_report

GIB = 2**30


SIZE = ModelSize(  # on 8 ranks 1 GiB of states each; over nodes of 4 ranks 0.25 GiB of parameters and 0.5 of gradients
    states_bytes=8 * GIB,
    root_bytes=0,
    root_reduced_bytes=0,
    block_bytes=0,
    block_reduced_bytes=0,
    gathered_bytes=1 * GIB,
    reduced_bytes=2 * GIB,
)


def report(
    world: int,
    k: int,
    p: int | Literal["auto"],
    *,
    states: int = GIB,
    communication: CommunicationOptions = CommunicationOptions.AUTO,
) -> str:
    ranks = 8 if p == "auto" else p
    job = ShardingJob(
        size=replace(SIZE, states_bytes=states * ranks),
        world_size=world,
        ranks_per_node=k,
        capacity_bytes=4 * GIB,
        partition_size=p,
        communication=communication,
    )
    return start_report(choose(job), reduce_dtype=torch.bfloat16)


def test_the_table_names_groups_techniques_and_memory():
    assert report(16, 4, "auto").splitlines() == [
        "MiCS",
        "  ranks                  16 on 4 nodes",
        '  partition groups       4 of 4 ranks ("auto": the fewest whole nodes that hold the model states)',
        "  replication groups     4 of 4 ranks",
        "  hierarchical           off: a partition group is inside one node",
        "  two-hop                on: gradients are reduced over replicas at the boundary only",
        "  gradients              reduced, and summed over micro-steps, in bfloat16",
        '  cache parameters       never ("auto": unsharded model states do not fit a rank; '
        "a partition group is inside one node)",
        '  accumulate gradients   shard ("auto": unsharded model states do not fit a rank; '
        "a partition group is inside one node)",
        "  inter-node gathers     none: a partition group is inside one node",
        "  inter-node reductions  once per step, by the second hop",
        "  model states           about 2 GiB of 4 GiB per rank (Adam; no activations)",
    ]
    assert report(16, 4, 8).splitlines()[4:] == [
        "  hierarchical           on: a partition group spans 2 nodes",
        "  two-hop                on: gradients are reduced over replicas at the boundary only",
        "  gradients              reduced, and summed over micro-steps, in bfloat16; "
        'over many micro-steps, reduce_dtype="float32" keeps what this rounds off',
        '  cache parameters       node ("auto": 0.25 GiB per rank of 2 GiB that model states leave)',
        '  accumulate gradients   node ("auto": 0.5 GiB per rank of 1.75 GiB that model states leave)',
        "  inter-node gathers     once per step",
        "  inter-node reductions  once per step",
        "  model states           about 1.75 GiB of 4 GiB per rank (Adam; no activations)",
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
    flat = replace(CommunicationOptions.AUTO, hierarchical=False)
    assert re.search(rf"hierarchical +{re.escape(reason)}\n", report(*shape, communication=flat))


def test_traffic_between_nodes_follows_from_where_parameters_and_gradients_are_held():
    rows = report(8, 4, 8, communication=CommunicationOptions(inter_node_reduce_dtype=torch.bfloat16))
    assert '  cache parameters       never ("node" would take 0.25 GiB per rank)\n' in rows
    assert "  inter-node gathers     at every use\n" in rows
    assert "  inter-node reductions  in every micro-step, as bfloat16\n" in rows


def test_on_one_node_nothing_crosses():
    assert "inter-node" not in report(4, 4, 2)


def test_a_partition_group_of_one_rank_has_no_traffic_of_its_own():
    rows = report(8, 4, 1)
    assert "cache parameters" not in rows and "accumulate gradients" not in rows


def test_without_replicas_there_is_no_second_hop():
    assert re.search("two-hop +off: there is only one replica", report(8, 4, 8))


def test_states_that_exceed_the_device_or_fill_it_are_warned_of():
    assert "the model states alone exceed the device" in report(8, 4, 8, states=5 * GIB)
    assert "leave little of the device" in report(8, 4, 8, states=4 * GIB)
    assert '("auto": all ranks, which hardly hold the model states)' in report(8, 4, "auto", states=4 * GIB)
    assert "warning" not in report(8, 4, 8)


def test_hops_that_are_not_two_are_named():
    rows = report(8, 4, 4, communication=replace(CommunicationOptions.AUTO, two_hop=False))
    assert (
        "two-hop                off: two_hop=False, so gradients are reduced over replicas in every micro-step\n"
        in rows
    )
    assert "inter-node reductions  in every micro-step, by the second hop\n" in rows
    assert "accumulate gradients   shard (two_hop=False reduces in every micro-step)\n" in rows


FROZEN = ModelSize(  # a root and three blocks, of which one has nothing frozen
    states_bytes=8 * GIB,
    root_bytes=GIB // 4,
    root_reduced_bytes=0,
    block_bytes=GIB // 4,
    block_reduced_bytes=0,
    gathered_bytes=GIB,
    reduced_bytes=GIB // 4,
    blocks_gathered_bytes=(GIB // 4,) * 3,
    blocks_reduced_bytes=(0, 0, GIB // 4),
    units=((100, 0), (100, 0), (100, 0), (100, 100)),
)


@pytest.mark.parametrize(
    ("k", "p", "given", "on_ranks", "said"),
    [
        (4, 8, {}, "0 (parameters are cached on ranks)", "are gathered once per job, and stay cached on ranks"),
        (
            4,
            8,
            {"cache_parameters": "node"},
            '1 ("auto": 2 of 2 blocks, for 0.375 GiB per rank)',
            "are gathered once per job, and stay cached on ranks",
        ),
        (
            4,
            8,
            {"cache_parameters": "node", "frozen_on_ranks": 0.5},
            "0.5 (1 of 2 blocks, for 0.188 GiB per rank)",
            "are gathered once per job, and stay cached on ranks, for blocks on ranks; those of others cross nodes "
            "once per job, and stay cached on nodes",
        ),
        (
            8,
            8,
            {"cache_parameters": "never", "frozen_on_ranks": 0.5},
            "0.5 (1 of 2 blocks, for 0.25 GiB per rank)",
            "are gathered once per job, and stay cached on ranks, for blocks on ranks; those of others are gathered "
            "at every use",
        ),
        (
            4,
            8,
            {"cache_parameters": "never", "frozen_on_ranks": 0.0},
            "0 (0 of 2 blocks, for 0 GiB per rank)",
            "are gathered at every use",
        ),
        (
            4,
            8,
            {"cache_parameters": 0.5, "frozen_on_ranks": 0.0},
            "0 (0 of 2 blocks, for 0 GiB per rank)",
            "cross nodes once per job, and stay cached there, for cached blocks, and at every use for others",
        ),
    ],
)
def test_frozen_weights_are_said_wherever_they_are_cached(
    k: int, p: int, given: dict[str, Any], on_ranks: str, said: str
) -> None:
    job = ShardingJob(
        size=FROZEN,
        world_size=8,
        ranks_per_node=k,
        capacity_bytes=16 * GIB,
        partition_size=p,
        communication=replace(CommunicationOptions.AUTO, accumulate_gradients="shard", **given),
    )
    rows = start_report(choose(job), reduce_dtype=torch.float32, frozen_bytes=GIB).splitlines()
    assert [row.split("  ")[-1].strip() for row in rows if row.startswith("  frozen on ranks ")] == [on_ranks]
    assert [row.split("  ")[-1].strip() for row in rows if row.startswith("  frozen weights ")] == [f"1 GiB {said}"]
