"""What travels once per step, by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mics.policy.memory import ModelSize
from lightning_mics.policy.once_per_step import OncePerStep, choose_once_per_step
from lightning_mics.topology import Topology

GIB = 2**30


SIZE = ModelSize(  # on 8 ranks 8 GiB of states each; over nodes of 4 ranks 1 GiB for the copy and 2 for the sums
    states_bytes=64 * GIB,
    root_bytes=0,
    root_reduced_bytes=0,
    block_bytes=0,
    block_reduced_bytes=0,
    gathered_bytes=4 * GIB,
    reduced_bytes=8 * GIB,
)


OVER_NODES = Topology(world_size=16, ranks_per_node=4, partition_size=8)


ON_A_NODE = Topology(world_size=16, ranks_per_node=4, partition_size=4)


def choose(
    usable_gib: float,
    *,
    size: ModelSize = SIZE,
    topology: Topology = OVER_NODES,
    staged: bool = True,
    two_hop: bool = True,
    **wanted: str,
) -> OncePerStep:
    kinds = ("cross_node_gather", "cross_node_reduce", "in_node_gather", "in_node_reduce")
    return choose_once_per_step(
        size,
        topology,
        **{kind: wanted.get(kind, "auto") for kind in kinds},
        two_hop=two_hop,
        hierarchical=staged,
        capacity_bytes=int(usable_gib * GIB / 0.75) + 1,
    )


def facts(chosen: OncePerStep) -> tuple[bool, bool, bool, bool, float]:
    return (
        chosen.cross_node_gather.once,
        chosen.cross_node_reduce.once,
        chosen.in_node_gather.once,
        chosen.in_node_reduce.once,
        chosen.kept_bytes / GIB,
    )


@pytest.mark.parametrize(
    ("usable_gib", "gather", "reduce", "kept_gib"),
    [
        (11, True, True, 3),
        (10.9, True, False, 1),
        (9, True, False, 1),
        (8.9, False, False, 0),
        (4, False, False, 0),
    ],
)
def test_auto_keeps_on_nodes_what_memory_allows_the_copy_first(usable_gib, gather, reduce, kept_gib):
    assert facts(choose(usable_gib)) == (gather, reduce, False, False, kept_gib)


@pytest.mark.parametrize("topology", [OVER_NODES, ON_A_NODE], ids=str)
def test_auto_keeps_all_on_each_rank_where_the_whole_model_states_would_fit(topology):
    between = topology.spans_nodes
    assert facts(choose(64, topology=topology, staged=between)) == (between, between, True, True, 12)
    assert facts(choose(63.9, topology=topology, staged=between))[2:4] == (False, False)


def test_auto_takes_no_more_than_the_whole_model_states_would():
    half = Topology(world_size=16, ranks_per_node=4, partition_size=2)  # 32 GiB of states
    much = replace(SIZE, gathered_bytes=20 * GIB, reduced_bytes=20 * GIB)
    assert facts(choose(64, size=much, topology=half, staged=False)) == (False, False, True, False, 20)


def test_the_reasons_name_both_sides_of_the_scale():
    assert choose(12).cross_node_gather.why == '"auto": 1 GiB per rank of 4 GiB that model states leave'
    assert choose(12).cross_node_reduce.why == '"auto": 2 GiB per rank of 3 GiB that model states leave'
    assert choose(8.5).cross_node_gather.why == '"auto": would take 1 GiB per rank, and model states leave 0.5 GiB'
    assert choose(1).cross_node_gather.why == '"auto": would take 1 GiB per rank, and model states leave 0 GiB'
    assert choose(12).in_node_gather.why == '"auto": a rank does not hold the whole model states'
    assert choose(64).in_node_reduce.why == '"auto": 8 GiB per rank of 52 GiB that model states leave'
    assert choose(64).cross_node_gather.why == "as inside nodes"


def test_what_the_user_says_is_done_whatever_it_takes():
    once = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}
    forced = choose(1, **once)
    assert facts(forced) == (True, True, False, False, 3)
    inside = choose(1, in_node_gather="once_per_step", in_node_reduce="once_per_step", **once)
    assert facts(inside) == (True, True, True, True, 12)
    refused = choose(100, cross_node_gather="every_use", cross_node_reduce="every_micro_step")
    assert facts(refused) == (False, False, False, False, 0)
    assert refused.in_node_gather.why == '"auto": as between nodes'
    node_only = choose(100, in_node_gather="every_use", in_node_reduce="every_micro_step")
    assert facts(node_only) == (True, True, False, False, 3)
    assert forced.cross_node_gather.why == "for 1 GiB per rank"
    assert refused.cross_node_gather.why == "would take 1 GiB per rank"


def test_without_a_stage_between_nodes_there_is_no_choice_there():
    inside = choose(60, topology=ON_A_NODE, staged=False)
    assert facts(inside) == (False, False, False, False, 0)
    assert inside.cross_node_gather.why == "a partition group is inside one node"
    flat = choose(60, staged=False)
    assert facts(flat) == (False, False, False, False, 0)
    assert flat.cross_node_gather.why == "collectives are flat"


def test_flat_collectives_can_run_once_per_step_as_a_whole():
    assert facts(choose(100, staged=False)) == (True, True, True, True, 12)


def test_one_rank_per_node_needs_no_stages():
    single = Topology(world_size=8, ranks_per_node=1, partition_size=8)
    assert facts(choose(63, topology=single, staged=False)) == (True, True, False, False, 12)


def test_a_partition_group_of_one_rank_has_nothing_to_keep():
    alone = choose(100, topology=Topology(world_size=8, ranks_per_node=4, partition_size=1), staged=False)
    assert facts(alone) == (False, False, False, False, 0)
    assert alone.in_node_gather.why == "a partition group is one rank"


def test_nothing_is_kept_back_from_a_second_hop_in_every_micro_step():
    assert facts(choose(100)) == (True, True, True, True, 12)
    assert facts(choose(100, two_hop=False)) == (True, False, True, False, 4)


def test_options_are_those_of_shard_model():
    assert choose(9).options() == {
        "cross_node_gather": "once_per_step",
        "cross_node_reduce": "every_micro_step",
        "in_node_gather": "every_use",
        "in_node_reduce": "every_micro_step",
    }
