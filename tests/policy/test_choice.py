"""What "auto" stands for, by memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_mics import CommunicationOptions
from lightning_mics.policy.choice import Choice, ShardingJob, choose
from lightning_mics.policy.memory import ModelSize
from lightning_mics.policy.policy import Policy
from lightning_mics.policy.resumed import choice_of_checkpoint
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


def chosen(
    usable_gib: float,
    *,
    size: ModelSize = SIZE,
    topology: Topology = OVER_NODES,
    **options: Any,
) -> Choice:
    job = ShardingJob(
        size=size,
        world_size=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
        partition_size=topology.partition_size,
        capacity_bytes=int(usable_gib * GIB / 0.75) + 1,
        communication=replace(CommunicationOptions.AUTO, **options),
    )
    return choose(job)


def facts(choice: Choice) -> tuple[str, str, float]:
    options = choice.communication
    return options.cache_parameters, options.accumulate_gradients, choice.cached_bytes / GIB


@pytest.mark.parametrize(
    ("usable_gib", "cache", "accumulate", "cached_gib"),
    [
        (11, "node", "node", 3),
        (10.9, "node", "shard", 1),
        (9, "node", "shard", 1),
        (8.9, "never", "shard", 0),
        (4, "never", "shard", 0),
    ],
)
def test_auto_holds_on_nodes_what_memory_allows_parameters_first(usable_gib, cache, accumulate, cached_gib):
    assert facts(chosen(usable_gib)) == (cache, accumulate, cached_gib)


@pytest.mark.parametrize("topology", [OVER_NODES, ON_A_NODE], ids=str)
def test_auto_holds_all_on_each_rank_where_the_whole_model_states_would_fit(topology):
    assert facts(chosen(64, topology=topology)) == ("rank", "rank", 12)
    assert "rank" not in facts(chosen(63.9, topology=topology))


def test_auto_takes_no_more_than_the_whole_model_states_would():
    half = Topology(world_size=16, ranks_per_node=4, partition_size=2)  # 32 GiB of states
    much = replace(SIZE, gathered_bytes=20 * GIB, reduced_bytes=20 * GIB)
    choice = chosen(64, size=much, topology=half)
    assert facts(choice) == ("rank", "shard", 20)
    assert choice.reasons["accumulate_gradients"] == (
        '"auto": "rank" would take 20 GiB per rank, and model states leave 12 GiB; a partition group is inside one node'
    )


def test_over_nodes_gradients_of_a_whole_model_that_do_not_fit_a_rank_are_accumulated_on_nodes():
    assert facts(chosen(64, size=replace(SIZE, gathered_bytes=50 * GIB))) == ("rank", "node", 52)


@pytest.mark.parametrize(
    ("usable_gib", "option", "reason"),
    [
        (12, "cache_parameters", '"auto": 1 GiB per rank of 4 GiB that model states leave'),
        (12, "accumulate_gradients", '"auto": 2 GiB per rank of 3 GiB that model states leave'),
        (8.5, "cache_parameters", '"auto": "node" would take 1 GiB per rank, and model states leave 0.5 GiB'),
        (1, "cache_parameters", '"auto": "node" would take 1 GiB per rank, and model states leave 0 GiB'),
        (64, "cache_parameters", '"auto": 4 GiB per rank of 56 GiB that model states leave'),
        (64, "accumulate_gradients", '"auto": 8 GiB per rank of 52 GiB that model states leave'),
    ],
)
def test_the_reasons_name_both_sides_of_the_scale(usable_gib, option, reason):
    assert chosen(usable_gib).reasons[option] == reason


def test_what_the_user_says_is_done_whatever_it_takes():
    nodes = chosen(1, cache_parameters="node", accumulate_gradients="node")
    assert facts(nodes) == ("node", "node", 3)
    assert facts(chosen(100, cache_parameters="node", accumulate_gradients="node")) == ("node", "node", 3)
    ranks = chosen(1, cache_parameters="rank", accumulate_gradients="rank")
    assert facts(ranks) == ("rank", "rank", 12)
    none = chosen(100, cache_parameters="never", accumulate_gradients="shard")
    assert facts(none) == ("never", "shard", 0)
    reasons = [choice.reasons["cache_parameters"] for choice in (nodes, ranks, none)]
    assert reasons == ["for 1 GiB per rank", "for 4 GiB per rank", '"node" would take 1 GiB per rank']


def test_inside_a_node_there_is_nothing_to_hold_on_nodes():
    reason = "a partition group is inside one node"
    auto = chosen(60, topology=ON_A_NODE)
    assert facts(auto) == ("never", "shard", 0)
    assert auto.reasons["cache_parameters"] == f'"auto": unsharded model states do not fit a rank; {reason}'
    asked = chosen(60, topology=ON_A_NODE, cache_parameters="node", accumulate_gradients="node")
    assert facts(asked) == ("never", "shard", 0)
    assert asked.reasons["cache_parameters"] == reason
    never = chosen(60, topology=ON_A_NODE, cache_parameters="never")
    assert never.reasons["cache_parameters"] == '"rank" would take 4 GiB per rank'


def test_flat_collectives_hold_parameters_on_nodes_and_no_sums():
    auto = chosen(60, hierarchical=False)
    assert facts(auto) == ("node", "shard", 1)
    why = '"auto": unsharded model states do not fit a rank; collectives are flat'
    assert auto.reasons["accumulate_gradients"] == why
    asked = chosen(60, cache_parameters="node", accumulate_gradients="node", hierarchical=False)
    assert facts(asked) == ("node", "shard", 1)
    assert asked.reasons["accumulate_gradients"] == "collectives are flat"


def test_flat_collectives_can_run_once_per_step_as_a_whole():
    assert facts(chosen(100, hierarchical=False)) == ("rank", "rank", 12)


def test_one_rank_per_node_needs_no_stages():
    single = Topology(world_size=8, ranks_per_node=1, partition_size=8)
    assert facts(chosen(63, topology=single)) == ("node", "node", 12)


def test_a_partition_group_of_one_rank_has_nothing_to_hold():
    alone = chosen(100, topology=Topology(world_size=8, ranks_per_node=4, partition_size=1))
    assert facts(alone) == ("never", "shard", 0)
    assert alone.reasons["cache_parameters"] == "a partition group is one rank"


def test_nothing_is_held_back_from_a_second_hop_in_every_micro_step():
    assert facts(chosen(100)) == ("rank", "rank", 12)
    assert facts(chosen(100, two_hop=False)) == ("rank", "shard", 4)


@pytest.mark.parametrize(("usable_gib", "size", "hold"), [(17, 4, "hold"), (9, 8, "hold"), (1, 16, "hardly hold")])
def test_the_partition_size_follows_from_memory(usable_gib, size, hold):
    capacity_bytes = int(usable_gib * GIB / 0.75) + 1
    choice = choose(ShardingJob(size=SIZE, world_size=16, ranks_per_node=4, capacity_bytes=capacity_bytes))
    assert choice.topology.partition_size == size
    assert choice.reasons["partition_size"].endswith(f" {hold} the model states")
    assert choice.communication.hierarchical == (size > 4)
    assert choice.fits == (hold == "hold")


def test_a_policy_chooses_by_its_own_options():
    policy = Policy(
        ranks_per_node=4, partition_size=8, accumulate_gradients="shard", inter_node_reduce_dtype="bfloat16"
    )
    choice = policy.choose(SIZE, world_size=16, local_size=8, capacity_bytes=16 * GIB)
    assert choice.topology == OVER_NODES
    assert choice.communication == CommunicationOptions(
        hierarchical=True, cache_parameters="node", inter_node_reduce_dtype=torch.bfloat16
    )
    assert choice.reasons["partition_size"] == "given"
    assert choice.capacity_bytes == 16 * GIB and choice.states_bytes == 8 * GIB


BLOCKS = replace(SIZE, blocks_gathered_bytes=(GIB // 2,) * 8, blocks_reduced_bytes=(GIB,) * 8)


@pytest.mark.parametrize(
    ("usable_gib", "cache", "accumulate", "cached_gib"),
    [
        (8.1, "never", "shard", 0),
        (8.6, 0.5, "shard", 0.5),
        (9.3, "node", 0.13, 1.25),
        (10.9, "node", 0.88, 2.75),
        (11, "node", "node", 3),
    ],
)
def test_where_not_all_blocks_fit_on_nodes_as_many_as_fit_are_there(
    usable_gib: float, cache: Any, accumulate: Any, cached_gib: float
) -> None:
    choice = chosen(usable_gib, size=BLOCKS)
    assert (choice.communication.cache_parameters, choice.communication.accumulate_gradients) == (cache, accumulate)
    assert choice.cached_bytes == cached_gib * GIB
    if isinstance(cache, float):
        assert "4 of 8 blocks on nodes, for 0.5 GiB" in choice.reasons["cache_parameters"]


FROZEN = ModelSize(  # four frozen blocks of 1 GiB, two of them with adapters
    states_bytes=8 * GIB,
    root_bytes=0,
    root_reduced_bytes=0,
    block_bytes=0,
    block_reduced_bytes=0,
    gathered_bytes=4 * GIB,
    reduced_bytes=0,
    blocks_gathered_bytes=(GIB,) * 4,
    blocks_reduced_bytes=(0,) * 4,
    units=((10, 0), (1000, 1), (1000, 1), (1000, 0), (1000, 0)),
)


@pytest.mark.parametrize(
    ("usable_gib", "topology", "share", "cached_gib"),
    [
        (5, OVER_NODES, 1.0, 4),  # all on nodes for 1 GiB, and each block on ranks for 0.75 GiB more
        (4.9, OVER_NODES, 0.75, 3.25),
        (2.7, OVER_NODES, 0.0, 1),
        (5, ON_A_NODE, 0.75, 3),  # nothing is cached on nodes
        (2.9, ON_A_NODE, 0.0, 0),
    ],
)
def test_auto_holds_frozen_weights_on_ranks_in_the_memory_that_other_caches_leave(
    usable_gib: float, topology: Topology, share: float, cached_gib: float
) -> None:
    choice = chosen(usable_gib, size=FROZEN, topology=topology)
    assert (choice.communication.frozen_on_ranks, choice.cached_bytes / GIB) == (share, cached_gib)
    assert choice.options["frozen_on_ranks"] == share
    given = chosen(usable_gib, size=FROZEN, topology=topology, frozen_on_ranks=0.25)
    assert given.communication.frozen_on_ranks == 0.25
    assert "1 of 4 blocks" in given.reasons["frozen_on_ranks"]


def test_a_model_without_frozen_weights_has_no_such_option() -> None:
    choice = chosen(11)
    assert choice.communication.frozen_on_ranks == 0.0
    assert "frozen_on_ranks" not in choice.options and "frozen_on_ranks" not in choice.reasons


@pytest.mark.parametrize("saved", [{"frozen_on_ranks": 0.25}, {}], ids=["saved", "of an earlier version"])
def test_a_job_that_resumes_keeps_what_ranks_held(saved: dict[str, float]) -> None:
    job = ShardingJob(size=FROZEN, world_size=16, ranks_per_node=4, partition_size=8, capacity_bytes=16 * GIB)
    options = {"hierarchical": True, "cache_parameters": "node", "accumulate_gradients": "node", **saved}
    topology = {"world_size": 16, "ranks_per_node": 4, "partition_size": 8}
    kept, note = choice_of_checkpoint({"mics_topology": topology, "mics_choice": options}, job)
    assert note == "the choice of the checkpoint is kept"
    assert kept is not None and kept.communication.frozen_on_ranks == saved.get("frozen_on_ranks", 0.0)
    assert choose(job).communication.frozen_on_ranks != 0.25
