"""What "auto" stands for where rates are known: the shortest communication that memory allows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from lightning_mics import CommunicationOptions
from lightning_mics.cost.communication_time import Pricing
from lightning_mics.cost.hardware import Links
from lightning_mics.cost.step_traffic import Unit
from lightning_mics.policy.choice import Choice, ShardingJob, choose, fitting_ways
from lightning_mics.policy.memory import ModelSize
from lightning_mics.policy.resumed import choice_of_checkpoint
from lightning_mics.policy.start_report import start_report
from lightning_mics.topology import Topology

GIB = 2**30
BLOCKS = 16
ROWS = 2**17  # of each block: 1/8 GiB of float32
UNITS = (Unit(((8, 64),), is_root=True), *(Unit(((ROWS, 256),), is_root=False) for _ in range(BLOCKS)))
BLOCK_BYTES = ROWS * 256 * 4
SIZE = ModelSize(  # 2 GiB of parameters
    states_bytes=4 * BLOCKS * BLOCK_BYTES,
    root_bytes=0,
    root_reduced_bytes=0,
    block_bytes=BLOCK_BYTES,
    block_reduced_bytes=BLOCK_BYTES,
    gathered_bytes=BLOCKS * BLOCK_BYTES,
    reduced_bytes=BLOCKS * BLOCK_BYTES,
    blocks_gathered_bytes=(BLOCK_BYTES,) * BLOCKS,
    blocks_reduced_bytes=(BLOCK_BYTES,) * BLOCKS,
)
FAST = 800.0  # Gbit/s of a node: as much as the links of a rank, so that stages, one after the other, take longer


def links(network: float, **others: float) -> Links:
    given = {"in_node_rate_gbytes_per_s": 100.0, "network_latency_us": 1.0, "in_node_latency_us": 1.0, **others}
    return Links(gpus_per_node=4, network_rate_gbits_per_s=network, network_achieved=1.0, **given)


def chosen(network: float, *, usable_gib: float, micro_steps: int = 4, nodes: int = 4, **options: Any) -> Choice:
    return choose(job(usable_gib, nodes, **options), pricing(network, micro_steps))


def job(usable_gib: float, nodes: int = 4, *, partition_size: Any = "auto", **options: Any) -> ShardingJob:
    return ShardingJob(
        size=SIZE,
        world_size=4 * nodes,
        ranks_per_node=4,
        capacity_bytes=int(usable_gib * GIB / 0.75) + 1,
        partition_size=partition_size,
        communication=replace(CommunicationOptions.AUTO, **options),
    )


def pricing(network: float, micro_steps: int = 4, **others: float) -> Pricing:
    return Pricing(
        units=UNITS,
        gathered_dtype=torch.float32,
        reduce_dtype=torch.float32,
        links=links(network, **others),
        micro_steps=micro_steps,
    )


def way(choice: Choice) -> tuple[Any, ...]:
    return tuple(choice.options.values())


FULL = (16, False, "never", "shard")


# of each rank: 0.5 GiB of states over all 16 ranks, 1 over 8; 0.5 for blocks in use; 0.5 for a cache or sums on nodes
@pytest.mark.parametrize(
    ("network", "usable_gib", "expected"),
    [
        (10, 1.02, (16, True, "never", "shard")),
        (10, 1.1, (16, True, 0.19, "shard")),
        (10, 1.6, (16, True, "node", 0.19)),
        (10, 2.1, (16, True, "node", "node")),
        (10, 9, (16, True, "rank", "rank")),  # all states would fit a rank
        (FAST, 1.02, FULL),
        (FAST, 9, (1, False, "never", "shard")),
    ],
)
def test_slow_networks_are_used_as_little_as_memory_allows_and_fast_ones_for_the_simplest(
    network: float, usable_gib: float, expected: Any
) -> None:
    assert way(chosen(network, usable_gib=usable_gib)) == expected


def test_nothing_is_slower_than_full_sharding_and_all_that_is_chosen_fits() -> None:
    everywhere = Topology(world_size=16, ranks_per_node=4, partition_size=16)
    for network, gib, micro_steps in product((1, 100, FAST, 10 * FAST), (1.02, 2, 4, 9), (1, 2, 16)):
        choice = chosen(network, usable_gib=gib, micro_steps=micro_steps)
        full = pricing(network, micro_steps).time(everywhere, CommunicationOptions(hierarchical=False))
        assert choice.fits and choice.time is not None and choice.time.seconds <= full.seconds
        assert way(choice) == FULL or way(choice.instead["full sharding"]) == FULL


def test_sums_that_are_worth_nothing_take_no_memory() -> None:
    assert way(chosen(10, usable_gib=4, micro_steps=1)) == (16, True, "node", "shard")
    assert way(chosen(10, usable_gib=4, micro_steps=2)) == (16, True, "node", "node")


def test_latency_favors_few_hops_where_messages_are_small() -> None:
    slow = {"network_latency_us": 1e5}
    choice = choose(job(4, nodes=16), pricing(FAST, **slow))
    assert choice.topology.partition_size < 64
    assert chosen(FAST, usable_gib=2.1, nodes=16).topology.partition_size == 64


def test_what_is_given_is_obeyed() -> None:
    pinned = {"partition_size": 8, "hierarchical": True, "cache_parameters": "never", "accumulate_gradients": "node"}
    assert chosen(10, usable_gib=4, **pinned).options == pinned
    for name, value in list(pinned.items())[2:]:
        assert chosen(10, usable_gib=4, **{name: value}).options[name] == value
    assert not chosen(10, usable_gib=4, hierarchical=False).communication.hierarchical
    assert chosen(
        FAST, usable_gib=1.02, partition_size=16, inter_node_reduce_dtype=torch.bfloat16
    ).communication.hierarchical
    assert len(fitting_ways(job(4, **pinned))) == 1


def test_without_rates_or_where_nothing_fits_memory_alone_chooses() -> None:
    alone = choose(job(4))
    assert way(alone) == (4, False, "never", "shard") and alone.time is None and not alone.instead
    assert choose(job(0.9), pricing(10)) == choose(job(0.9))
    assert fitting_ways(job(0.9)) == []


def test_the_report_says_what_was_chosen_and_how_to_pin_it() -> None:
    report = start_report(chosen(10, usable_gib=1.6), reduce_dtype=torch.float32)
    for row in (
        'partition groups       1 of 16 ranks ("auto": the shortest communication)',
        'cache parameters       node ("auto": by time; 0.5 GiB per rank of 0.6 GiB that model states leave)',
        "links, measured        100 GB/s and 1 us per hop inside nodes; 10 Gbit/s per node and 1 us per hop between "
        "nodes",
        "communication          5.91 s per step of 4 micro-steps if nothing hides it, limited by the network",
        'second best            8.17 s: partition_size=16, hierarchical=False, cache_parameters="node", '
        'accumulate_gradients="shard"',
        'full sharding          19.3 s: partition_size=16, hierarchical=False, cache_parameters="never", '
        'accumulate_gradients="shard"',
        'to pin this            partition_size=16, hierarchical=True, cache_parameters="node", '
        "accumulate_gradients=0.19",
    ):
        assert f"\n  {row}\n" in report
    choice = chosen(FAST, usable_gib=1.02)
    assert "hierarchical           off: as fast as in stages, or faster" in start_report(
        choice, reduce_dtype=torch.float32
    )
    assert "measured" not in start_report(choose(job(4)), reduce_dtype=torch.float32)


# -- on resume ---------------------------------------------------------------------------------------------------------


def of_checkpoint(saved: Any, *, nodes: int = 4, usable_gib: float = 4, **options: Any) -> tuple[Any, str]:
    """The choice that is kept of one that a job of 4 nodes has saved, and what is said about it."""
    topology = {"world_size": 16, "ranks_per_node": 4, "partition_size": 16}
    meta = {"mics_topology": topology, "mics_choice": saved}
    choice, note = choice_of_checkpoint(meta, job(usable_gib, nodes, **options))
    return choice and way(choice), note


def test_the_choice_of_a_checkpoint_is_kept_if_the_job_is_the_same() -> None:
    saved = chosen(10, usable_gib=1.6).options
    assert of_checkpoint(saved) == ((16, True, "node", 0.19), "the choice of the checkpoint is kept")
    of_some = {name: value for name, value in saved.items() if name != "partition_size"}
    assert of_checkpoint(of_some, partition_size=8)[0] == (8, True, "node", 0.19)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"nodes": 2}, "chosen anew: the checkpoint is of 16 ranks, 4 per node"),
        ({"partition_size": 8}, 'chosen anew: other options are "auto" than in the run that saved the checkpoint'),
        ({"usable_gib": 1.5}, "chosen anew: the options in the checkpoint leave too little memory here"),
        ({"saved": {"partition_size": 3}}, 'chosen anew: other options are "auto" than'),
        ({"saved": "nonsense"}, ""),
        ({"saved": {}}, ""),
    ],
)
def test_otherwise_it_is_chosen_anew_and_said_why(changes: dict[str, Any], note: str) -> None:
    given = {"saved": chosen(10, usable_gib=1.6).options, **changes}
    choice, why = of_checkpoint(given.pop("saved"), **given)
    assert choice is None and why.startswith(note) and bool(why) == bool(note)


def test_a_choice_that_fits_no_job_is_not_taken_from_a_checkpoint() -> None:
    saved = {**chosen(10, usable_gib=1.6).options, "partition_size": 3}
    assert of_checkpoint(saved) == (None, "chosen anew: the options in the checkpoint do not fit this job")


def test_checkpoints_of_earlier_versions_have_no_choice() -> None:
    assert choice_of_checkpoint({}, job(4)) == (None, "")
