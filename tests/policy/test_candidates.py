"""The fastest way to run a job: what is searched, what is taken, and what is never overridden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.auto.pairs import planned_pairs, ratio
from lightning_mics import CommunicationOptions
from lightning_mics.cost.hardware import find_instance
from lightning_mics.cost.step_traffic import Unit, find_units
from lightning_mics.policy.activations import ALL_SAVED, Activations, Line
from lightning_mics.policy.baselines import full_sharding, full_sharding_tuned
from lightning_mics.policy.candidates import Candidate, Job
from lightning_mics.policy.fastest import fastest
from lightning_mics.policy.memory import ModelSize, measure_model, usable_bytes
from lightning_mics.policy.workload import Workload
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.options import share_of, spread_over
from tests.support.campaign import campaign

GIB = 2**30
P4D = find_instance("p4d.24xlarge")
AUTO = CommunicationOptions.AUTO
BLOCK = 2**27  # elements


def work(**options: Any) -> Workload:
    """Forty blocks of 0.5 GiB and a root of as much, in float32; a sample takes 0.25 GiB."""
    units = (Unit(((2**14, 2**13),), is_root=True), *[Unit(((2**14, 2**13),), is_root=False)] * 40)
    total = 4 * 41 * BLOCK
    size = ModelSize(
        states_bytes=4 * total,
        root_bytes=4 * BLOCK,
        root_reduced_bytes=4 * BLOCK,
        block_bytes=4 * BLOCK,
        block_reduced_bytes=4 * BLOCK,
        gathered_bytes=total,
        reduced_bytes=total,
        gradients_bytes=total,
    )
    facts = {
        "units": units,
        "size": size,
        "parameters": 41 * BLOCK,
        "activations": Activations(
            {phase: (Line(0, 0.25 * GIB),) for phase in ALL_SAVED} | {"first": (Line(0, 0.05 * GIB),)}
        ),
        "model_flops": 6e12,
        "hardware_flops": 8e12,
        "gathered_dtype": torch.float32,
        "reduce_dtype": torch.float32,
    }
    return Workload(**{**facts, **options})


def job(**options: Any) -> Job:
    facts = {"workload": work(), "hardware": P4D, "world_size": 32, "ranks_per_node": 8, "global_batch_size": 1024}
    return Job(**{**facts, **options})


def taken(job: Job, **communication: Any) -> Candidate:
    candidates = list(job.candidates("auto", replace(AUTO, **communication)))
    return fastest(candidates, full_sharding(job), full_sharding_tuned(job))


def test_full_sharding_is_always_among_the_candidates() -> None:
    baseline = full_sharding(job())
    same = [
        candidate
        for candidate in job().candidates("auto", AUTO)
        if (candidate.topology, candidate.batches, candidate.communication)
        == (baseline.topology, baseline.batches, replace(AUTO, hierarchical=False, frozen_on_ranks=0.0, **paper()))
    ]
    assert len(same) == 1
    assert same[0].seconds == baseline.seconds and same[0].memory_bytes == baseline.memory_bytes


def paper() -> dict[str, Any]:
    return {"cache_parameters": "never", "accumulate_gradients": "shard"}


@pytest.mark.parametrize("rate", [3200, 400, 100, 25])
def test_what_is_taken_is_no_slower_than_full_sharding_whatever_overlaps(rate: float) -> None:
    slower = job(hardware=replace(P4D, network_rate_gbits_per_s=rate))
    best, baseline = taken(slower), full_sharding(slower)
    assert best.fits
    assert best.seconds.expected <= min(baseline.seconds.expected, full_sharding_tuned(slower).seconds.expected)
    assert best.seconds.least <= 1.01 * baseline.seconds.least and best.seconds.most <= 1.01 * baseline.seconds.most


def test_on_a_slow_network_parameters_are_cached_and_gradients_accumulated() -> None:
    best = taken(job(hardware=replace(P4D, network_rate_gbits_per_s=25), micro_batch=4))
    assert best.batches.accumulation == 8
    assert best.communication.cache_parameters != "never" and best.communication.accumulate_gradients != "shard"
    assert best.topology.spans_nodes and best.in_stages


@pytest.mark.parametrize(
    "given",
    [
        {"cache_parameters": "never"},
        {"accumulate_gradients": "shard"},
        {"hierarchical": True},
        {"hierarchical": False},
        {"inter_node_reduce_dtype": torch.bfloat16},
        {"two_hop": False},
        {"allow_unused": True},
    ],
    ids=str,
)
def test_what_is_given_is_obeyed_by_all_candidates(given: dict[str, Any]) -> None:
    candidates = list(job().candidates("auto", replace(AUTO, **given)))
    ((name, value),) = given.items()
    inside = {c.topology.partition_size for c in candidates if not c.topology.spans_nodes}
    assert candidates and (inside or name == "hierarchical")
    over_nodes = [candidate for candidate in candidates if candidate.topology.spans_nodes]
    assert over_nodes and all(getattr(candidate.communication, name) == value for candidate in over_nodes)


def test_given_batches_are_the_only_ones() -> None:
    assert {candidate.batches.micro for candidate in job(micro_batch=4).candidates("auto", AUTO)} == {4}
    assert {candidate.batches.accumulation for candidate in job(accumulation=4).candidates("auto", AUTO)} == {4}
    with pytest.raises(ValueError, match="global_batch_size=1000 sequences cannot be split over 32 ranks"):
        job(global_batch_size=1000)


def test_an_option_that_does_not_fit_a_given_partition_size_is_an_error() -> None:
    flat_sums = replace(AUTO, hierarchical=False, accumulate_gradients="node")
    with pytest.raises(ValueError, match="accumulate_gradients='node' needs a separate inter-node stage"):
        list(job().candidates(32, flat_sums))
    assert {candidate.topology.partition_size for candidate in job().candidates("auto", flat_sums)} == {1, 2, 4, 8}
    with pytest.raises(ValueError, match="hierarchical=True needs partition groups over several nodes"):
        list(job().candidates(8, replace(AUTO, hierarchical=True)))


def test_of_candidates_as_fast_as_each_other_the_simplest_is_taken() -> None:
    single = job(world_size=8, hardware=replace(P4D, in_node_rate_gbytes_per_s=1e6, in_node_latency_us=1e-3))
    best = taken(single)
    assert (best.communication.cache_parameters, best.communication.accumulate_gradients) == ("never", "shard")


def test_micro_steps_of_few_tokens_are_avoided_where_larger_ones_fit() -> None:
    each = job(hardware=replace(P4D, network_rate_gbits_per_s=25))
    baseline, tuned = full_sharding(each), full_sharding_tuned(each)
    candidates = list(each.candidates("auto", AUTO))
    tokens = 64
    best = fastest(candidates, baseline, tuned, sample_tokens=tokens)
    assert best.batches.micro * tokens >= 2048
    only_small = [candidate for candidate in candidates if candidate.batches.micro <= 2]
    assert fastest(only_small, baseline, tuned, sample_tokens=tokens).fits


def test_if_nothing_fits_what_takes_least_memory_is_taken() -> None:
    tight = job(hardware=replace(P4D, memory_gib=5))
    candidates = list(tight.candidates("auto", AUTO))
    best = taken(tight)
    assert not best.fits
    assert best.memory_bytes == min(candidate.memory_bytes for candidate in candidates)


def test_memory_is_what_decides_the_largest_micro_batch_of_full_sharding() -> None:
    baseline = full_sharding(job())
    larger = [c for c in job().candidates(32, replace(AUTO, hierarchical=False, **paper())) if c.batches.micro > 16]
    assert baseline.fits and baseline.memory_bytes <= usable_bytes(P4D.memory_bytes)
    assert not any(c.fits for c in larger if c.batches.micro > baseline.batches.micro)


@pytest.mark.rehearsal
@pytest.mark.parametrize(("model", "cluster"), [("gpt-20b", "p4d_16"), campaign("bert-10b", "p3dn_16")])
def test_no_plan_of_these_models_is_slower_than_full_sharding_at_its_best(model: str, cluster: str) -> None:
    rows = list(planned_pairs([model], [cluster]))
    assert len(rows) == (3 if cluster == "p4d_16" else 2)  # the rates of the cluster, 100 and 25
    for row in rows:
        assert row["recommended"]["fits"]
        assert ratio(row, "baseline") >= 1
        assert ratio(row, "baseline", "least") >= 0.99 and ratio(row, "baseline", "most") >= 0.99
        assert row["recommended"]["between_bytes"] <= 1.05 * row["baseline"]["between_bytes"]


def recomputable(per_sample: float) -> Workload:
    """All blocks recomputed, or none, which takes a quarter less arithmetic and ``per_sample`` bytes."""
    saved = Activations({phase: (Line(0, per_sample),) for phase in ALL_SAVED})
    none = work(activations=saved, hardware_flops=6e12, recomputed_share=0.0)
    return work(recomputed_share=1.0, alternatives=(none,), sample_tokens=512)


def test_blocks_are_not_recomputed_where_memory_allows() -> None:
    assert taken(job(workload=recomputable(GIB))).recomputed_share == 0
    tuned = full_sharding_tuned(job(workload=recomputable(0.3 * GIB)))
    assert tuned.fits and tuned.recomputed_share == 0  # a fair comparison
    assert full_sharding(job(workload=recomputable(GIB))).recomputed_share == 1
    assert taken(job(workload=recomputable(20 * GIB))).recomputed_share == 1
    given = replace(recomputable(GIB), alternatives=())
    assert taken(job(workload=given)).recomputed_share == 1


def test_prefetching_between_nodes_is_priced_where_it_is_given() -> None:
    slow = job(hardware=replace(P4D, network_rate_gbits_per_s=100), micro_batch=4)
    staged = replace(AUTO, hierarchical=True, **paper())

    def over_nodes(ahead: int) -> Candidate:
        (found,) = slow.candidates(32, replace(staged, inter_node_prefetch=ahead))
        return found

    without, one = over_nodes(0), over_nodes(1)
    assert one.seconds.expected < without.seconds.expected
    assert one.node_sent == without.node_sent and one.memory_bytes > without.memory_bytes
    assert all(c.communication.inter_node_prefetch == 0 for c in slow.candidates("auto", AUTO))


def test_a_plan_prefetches_between_nodes_where_that_is_worth_a_slice() -> None:
    slow = job(hardware=replace(P4D, network_rate_gbits_per_s=100), micro_batch=4)
    free = list(slow.candidates("auto", replace(AUTO, inter_node_prefetch="auto")))
    assert {(c.in_stages, c.communication.inter_node_prefetch) for c in free} == {(False, 0), (True, 0), (True, 1)}

    def over_nodes(of: Job, **options: Any) -> int | str:
        asked = replace(AUTO, hierarchical=True, inter_node_prefetch="auto", **options)
        chosen = fastest(list(of.candidates(32, asked)), full_sharding(of), full_sharding_tuned(of))
        return chosen.communication.inter_node_prefetch

    assert over_nodes(slow, **paper()) == 1
    assert over_nodes(slow, cache_parameters="rank", accumulate_gradients="rank") == 0  # nearly as fast without
    on_host = replace(slow, workload=work(size=replace(work().size, offload=True)))  # nothing to send ahead from
    assert over_nodes(on_host, **paper()) == 0


def offloadable(on_host: float) -> Workload:
    """Inputs of blocks on the device, 8 GiB of a sample, or on the host, ``on_host`` bytes."""
    kept = Activations({phase: (Line(0, 8 * GIB),) for phase in ALL_SAVED})
    moved = Activations({phase: (Line(0, 0.25 * GIB),) for phase in ALL_SAVED}, on_host=on_host)
    on_the_host = work(activations=moved, recomputed_share=1.0, activation_offload=True)
    return work(activations=kept, recomputed_share=1.0, alternatives=(on_the_host,))


def test_inputs_of_blocks_go_to_the_host_where_that_is_faster_and_fits_it() -> None:
    slow = replace(P4D, network_rate_gbits_per_s=50)
    best = taken(job(workload=offloadable(0.5 * GIB), hardware=slow))
    assert best.activation_offload and best.fits and best.batches.micro > 4
    tuned = full_sharding_tuned(job(workload=offloadable(0.5 * GIB), hardware=slow))
    assert tuned.activation_offload  # a fair comparison
    assert not full_sharding(job(workload=offloadable(0.5 * GIB), hardware=slow)).activation_offload
    for small in (replace(slow, host_memory_gib=8), replace(slow, host_rate_gbytes_per_s=0.01)):
        best = taken(job(workload=offloadable(0.5 * GIB), hardware=small))
        assert best.fits and not best.activation_offload
    plain = taken(job(workload=offloadable(0.5 * GIB), micro_batch=1))
    assert not plain.activation_offload  # nothing is gained, so nothing is moved


def test_a_plan_fits_if_the_host_holds_the_model_states_that_are_there() -> None:
    size = replace(
        work().size, states_bytes=0, gradients_bytes=0, offload=True, offloaded_bytes=work().size.states_bytes
    )
    per_rank_gib = size.per_rank_host_bytes(8) / GIB
    for spare_gib, fits in ((1, True), (-1, False)):
        host = replace(P4D, host_memory_gib=8 * (per_rank_gib + spare_gib) / 0.75)
        of_node = [c for c in job(workload=work(size=size), hardware=host).candidates(8, AUTO) if c.batches.micro == 1]
        assert of_node and any(c.fits for c in of_node) == fits


def test_micro_steps_of_few_tokens_are_no_reason_not_to_recompute() -> None:
    each = job(workload=recomputable(5 * GIB))  # without recomputation, fewer than 4 samples of 512 tokens fit
    candidates = list(each.candidates("auto", AUTO))
    tuned = full_sharding_tuned(each)
    assert any(c.fits and c.recomputed_share == 0 and c.batches.micro == 2 for c in candidates)
    best = fastest(candidates, full_sharding(each), tuned, sample_tokens=512)
    assert best.recomputed_share == tuned.recomputed_share == 1
    assert best.seconds.expected <= tuned.seconds.expected


def test_as_many_blocks_are_cached_as_fit_and_each_of_them_is_worth_its_bytes() -> None:
    hardware = replace(P4D, network_rate_gbits_per_s=50)
    whole = job(hardware=hardware, micro_batch=8, accumulation=4)
    communication = replace(AUTO, accumulate_gradients="shard")
    never, node = (
        next(each for each in whole.candidates(32, replace(communication, cache_parameters=place)) if each.in_stages)
        for place in ("never", "node")
    )
    between = (never.memory_bytes + node.memory_bytes) / 2
    capacity_gib = next(size / 8 for size in range(8 * 40) if usable_bytes(int(size / 8 * GIB)) > between)
    tight = replace(whole, hardware=replace(hardware, memory_gib=capacity_gib))
    candidates = list(tight.candidates(32, communication))
    in_stages = (each for each in candidates if each.in_stages)
    (part,) = (each for each in in_stages if isinstance(each.communication.cache_parameters, float))
    share = part.communication.cache_parameters
    assert isinstance(share, float) and 0.4 < share < 0.7
    assert part.fits and not any(each.fits for each in candidates if each.communication.cache_parameters == "node")
    one_more = replace(communication, cache_parameters=share + 1 / 40)
    assert not any(each.fits for each in tight.candidates(32, one_more) if each.in_stages)
    saved = never.node_sent.between_bytes - part.node_sent.between_bytes
    of_all = never.node_sent.between_bytes - node.node_sent.between_bytes
    crossings = 40 * 7 + 3  # saved of the blocks, gathered twice in each micro-step, and of the root, gathered once
    assert saved / of_all == pytest.approx(sum(spread_over(40, share)) * 7 / crossings, rel=1e-6)
    assert node.seconds.expected < part.seconds.expected < never.seconds.expected


SMALL = replace(P4D, memory_gib=12)  # the caches of 2.6 GiB, and sums of as much, do not fit beside the rest
TIGHT = {"global_batch_size": 512, "micro_batch": 4, "hardware": SMALL}


def on_host(**options: Any) -> Candidate:
    return taken(job(**{**TIGHT, **options}), cache_offload="auto")


def test_caches_and_sums_go_to_the_host_where_that_is_faster_and_fits_it() -> None:
    slow = replace(SMALL, network_rate_gbits_per_s=50)
    plain, moved = taken(job(**{**TIGHT, "hardware": slow})), on_host(hardware=slow)
    assert not plain.communication.cache_offload and moved.communication.cache_offload is True
    assert moved.fits and moved.seconds.expected < plain.seconds.expected / 1.01
    assert moved.node_sent.between_bytes < plain.node_sent.between_bytes
    for poor in (replace(slow, host_memory_gib=8), replace(slow, host_rate_gbytes_per_s=0.01)):
        found = on_host(hardware=poor)
        assert found.fits and not found.communication.cache_offload
    assert not on_host(hardware=replace(slow, memory_gib=10**4)).communication.cache_offload  # nothing is gained


def test_only_what_does_not_fit_the_device_is_priced_on_the_host() -> None:
    every = list(job(**TIGHT).candidates("auto", replace(AUTO, cache_offload="auto")))
    tight = {key(c) for c in every if not c.fits and not c.communication.cache_offload}
    moved = [c for c in every if c.communication.cache_offload]
    assert moved and all(key(c) in tight and "node" in key(c)[3:5] for c in moved)
    assert len(moved) == len({key(c) for c in moved})
    as_before = list(job(**TIGHT).candidates("auto", AUTO))
    assert [c for c in every if not c.communication.cache_offload] == as_before


def key(candidate: Candidate) -> tuple[Any, ...]:
    options = candidate.communication
    size = candidate.topology.partition_size
    return size, candidate.batches, options.hierarchical, options.cache_parameters, options.accumulate_gradients


def test_what_must_be_on_the_host_is_in_all_candidates() -> None:
    for size in ("auto", 32):
        every = list(job(**TIGHT).candidates(size, replace(AUTO, cache_offload=True)))  # type: ignore[arg-type]
        assert every and all(c.communication.cache_offload is True and c.topology.spans_nodes for c in every)
        assert {c.communication.cache_parameters for c in every} == {"never", "node", "rank"}
    with pytest.raises(ValueError, match="partition_size=8 is inside a node"):
        list(job(**TIGHT).candidates(8, replace(AUTO, cache_offload=True)))


class AdaptedBlock(nn.Module):
    """Half a GiB of frozen weights, and adapters of 16 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(2**14, 2**13), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.empty(16, 2**13)), nn.Parameter(torch.empty(2**14, 16))


def adapted(**options: Any) -> Workload:
    """The same blocks, frozen, with adapters."""
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList(AdaptedBlock() for _ in range(40))
        model.embed = nn.Parameter(torch.empty(2**14, 2**13), requires_grad=False)
    blocks = find_blocks(model)
    units, size = tuple(find_units(model, blocks)), measure_model(model, blocks.values())
    return work(units=units, size=size, parameters=sum(p.numel() for p in model.parameters()), **options)


@pytest.mark.parametrize("partition_size", [8, 16])
def test_ranks_hold_frozen_weights_of_as_many_blocks_as_fit(partition_size: int) -> None:
    tuned = job(workload=adapted())
    candidates = list(tuned.candidates(partition_size, AUTO))
    with_share = [c for c in candidates if c.communication.frozen_on_ranks]
    assert with_share
    for candidate in with_share:
        options = candidate.communication
        assert candidate.fits and options.cache_parameters != "rank"
        (beside,) = (
            c
            for c in candidates
            if (c.batches, c.communication) == (candidate.batches, replace(options, frozen_on_ranks=0.0))
        )
        assert candidate.seconds.expected < beside.seconds.expected
        assert candidate.node_sent.inside_bytes < beside.node_sent.inside_bytes
        count = sum(spread_over(40, float(options.frozen_on_ranks)))
        if count < 40:
            more = replace(options, frozen_on_ranks=share_of(count + 1, 40))
            (larger,) = tuned.priced("MiCS", candidate.topology, more, only=[(tuned.workload, candidate.batches)])
            assert larger.memory_bytes > usable_bytes(P4D.memory_bytes)
    without = taken(tuned, frozen_on_ranks=0.0)
    best = taken(tuned)
    assert without.communication.frozen_on_ranks == 0.0
    assert best.seconds.expected <= without.seconds.expected


def test_a_model_without_frozen_weights_has_none_on_ranks() -> None:
    assert not any(c.communication.frozen_on_ranks for c in job().candidates("auto", AUTO))
    given = list(job(workload=adapted()).candidates(16, replace(AUTO, frozen_on_ranks=0.25)))
    assert {c.communication.frozen_on_ranks for c in given} == {0.25, 0.0}  # none beside caches of all on ranks
    assert all((c.communication.cache_parameters == "rank") == (not c.communication.frozen_on_ranks) for c in given)
