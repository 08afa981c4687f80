"""Parameters with fewer rows than ranks are sharded along another dim: without padding, and with the same numbers."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.cost.collective import Collective
from lightning_mics.cost.step_traffic import find_units, step_traffic
from lightning_mics.planning import measure_workload
from lightning_mics.planning.rehearsal.rehearse import Rehearsal, rehearse
from lightning_mics.policy.step_memory import step_bytes
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.techniques.sharded_dim import padded_numel, sharded_dim
from tests.support.forked import run_cases
from tests.support.narrow import DIM, NARROW, batch, by_rows, narrow, network, sgd, whole

STEPS, MICRO_STEPS = 4, 2
LARGEST_NORM = 0.02
NODE, RANK = CommunicationOptions.NODE, CommunicationOptions.RANK

# -- which dim ---------------------------------------------------------------------------------------------------------

CHOICES: dict[tuple[tuple[int, ...], int], tuple[int, int]] = {
    ((2, 16), 4): (1, 32),
    ((2, 16), 2): (0, 32),  # as many rows as ranks
    ((3, 16), 2): (0, 64),
    ((2, 18), 4): (0, 72),  # 18 columns do not divide by 4
    ((2, 3, 8), 4): (2, 48),
    ((2, 8, 4), 4): (1, 64),  # the longest
    ((2, 4, 9), 4): (1, 72),
    ((3,), 4): (0, 4),
    ((1, 4), 1): (0, 4),
    ((0, 8), 4): (0, 0),
    ((2, 0), 4): (0, 0),
}


@pytest.mark.parametrize(("shape", "ranks"), CHOICES)
def test_the_longest_even_dim_is_sharded_where_rows_are_fewer_than_ranks(shape: tuple[int, ...], ranks: int) -> None:
    assert (sharded_dim(shape, ranks), padded_numel(shape, ranks)) == CHOICES[shape, ranks]


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    topology: Topology, options: CommunicationOptions, dtype: torch.dtype = torch.float32, **of_sharding: Any
) -> dict[str, Any]:
    model = network(dtype)
    groups = create_partition_groups(topology, device_type="cpu")
    schedule = shard_model(model, groups, communication=options, **of_sharding)
    optimizer = sgd(model)
    losses, sent = [], [0.0]
    for step in range(STEPS):
        total = torch.zeros(())
        for micro_step in range(MICRO_STEPS):
            with schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                loss = model(batch(dist.get_rank(), step, micro_step)) / MICRO_STEPS
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses += [float(total) / dist.get_world_size(), float(norm)]
        by_technique = schedule.traffic.by_technique().values()
        sent.append(topology.ranks_per_node * sum(each.between_bytes for each in by_technique))
    of_steps = [after - before for before, after in pairwise(sent)]
    return {"losses": losses, "sent": of_steps, "weights": whole(model), "narrow": narrow(model)}


def train_in_mixed_precision(options: CommunicationOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sharded as it is, and along rows."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = train(OVER_NODES, options, mixed_precision=policy)
    with by_rows():
        return found, train(OVER_NODES, options, mixed_precision=policy)


def alone(ranks: int, dtype: torch.dtype = torch.float32) -> tuple[list[float], dict[str, Tensor]]:
    model = network(dtype)
    optimizer = sgd(model)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro_step in range(MICRO_STEPS):
            for rank in range(ranks):
                loss = model(batch(rank, step, micro_step)) / MICRO_STEPS / ranks
                loss.backward()
                total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses += [total, float(norm)]
    return losses, whole(model)


SCHEDULES = {"paper": CommunicationOptions.PAPER, "node": NODE, "rank": RANK}
OVER_NODES = Topology(world_size=4, ranks_per_node=2, partition_size=4)
RANKS = {
    "two nodes": OVER_NODES,
    "one node, flat": Topology(world_size=4, ranks_per_node=4, partition_size=4),
    "two replicas": Topology(world_size=8, ranks_per_node=4, partition_size=4),
    "eight": Topology(world_size=8, ranks_per_node=4, partition_size=8),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


CASES = [
    *(("two nodes", schedule, dtype) for schedule in SCHEDULES for dtype in DTYPES),  # of two dtypes, gathered as bytes
    ("one node, flat", "paper", "float32"),
    ("one node, flat", "rank", "float32"),
    ("two replicas", "paper", "float32"),
    ("eight", "node", "float32"),
    ("eight", "rank", "float32"),
]


@pytest.fixture(scope="module")
def runs() -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {
        (ranks, schedule, dtype): partial(train, RANKS[ranks], SCHEDULES[schedule], DTYPES[dtype])
        for ranks, schedule, dtype in CASES
    }
    on_eight = {case: run for case, run in cases.items() if RANKS[case[0]].world_size == 8}
    on_four = {case: run for case, run in cases.items() if case not in on_eight}
    on_four |= {("mixed", name): partial(train_in_mixed_precision, o) for name, o in SCHEDULES.items()}
    return {**run_cases(4, on_four), **run_cases(8, on_eight)}


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_narrow_matrices_train_as_in_one_process(case: tuple[str, str, str], runs: dict[Any, list[Any]]) -> None:
    losses, weights = alone(RANKS[case[0]].world_size, DTYPES[case[2]])
    before = network(DTYPES[case[2]]).state_dict()
    for of_rank in runs[case]:
        assert of_rank["narrow"] == NARROW
        assert of_rank["losses"] == pytest.approx(losses, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(of_rank["weights"][name], value, atol=1e-6, rtol=0)
            moved = float((value - before[name]).abs().max())
            assert moved == 0 if "base" in name else moved > 5e-4
    assert min(losses[1::2]) > LARGEST_NORM  # gradients were clipped


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["node", "rank"])
def test_a_node_sends_what_trains_once_per_step(schedule: str, dtype: str, runs: dict[Any, list[Any]]) -> None:
    padded = 4 * sum(padded_numel(p.shape, 4) for p in network().parameters() if p.requires_grad)
    for of_rank in runs["two nodes", schedule, dtype]:
        assert all(each == padded for each in of_rank["sent"][1:])  # 2 A (N - 1) / N for two nodes
        assert of_rank["sent"][0] > padded


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mixed_precision_has_the_numbers_of_rows(schedule: str, runs: dict[Any, list[Any]]) -> None:
    in_float32 = alone(4)[1]
    for found, expected in runs["mixed", schedule]:
        assert (found["narrow"], expected["narrow"]) == (NARROW, [])
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        torch.testing.assert_close(found["weights"], expected["weights"], atol=1e-6, rtol=0)
        assert any((found["weights"][name] - value).abs().max() > 1e-5 for name, value in in_float32.items())


# -- adapters ----------------------------------------------------------------------------------------------------------


class AdaptedLayer(nn.Module):
    """A frozen square matrix and its adapter of low rank."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(dim, dim, bias=False).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.lora_B(self.lora_A(x)))


class Adapted(nn.Module):
    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdaptedLayer(dim, rank) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def adapter_bytes(dim: int, rank: int) -> int:
    return 3 * 2 * dim * rank * 4


def sent_per_step(rank: int) -> float:
    """Bytes of a node to other nodes in the second step, on eight ranks of two nodes."""
    topology = Topology(world_size=8, ranks_per_node=4, partition_size=8)
    model = Adapted(DIM, rank)
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=NODE)
    optimizer = sgd(model)
    sent = []
    for step in range(2):
        with schedule.micro_step(boundary=True):
            model(batch(dist.get_rank(), step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(sum(each.between_bytes for each in schedule.traffic.by_technique().values()))
    return topology.ranks_per_node * (sent[1] - sent[0])


@pytest.fixture(scope="module")
def sent_of_ranks() -> dict[int, list[float]]:
    return run_cases(8, {rank: partial(sent_per_step, rank) for rank in (4, 8, 16)})


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_adapters_on_eight_ranks_are_sent_without_padding(rank: int, sent_of_ranks: dict[int, list[float]]) -> None:
    bound = 2 * adapter_bytes(DIM, rank) * (2 - 1) / 2
    assert sent_of_ranks[rank] == [bound] * 8


def rehearsed(dim: int, rank: int, topology: Topology, options: CommunicationOptions, micro_steps: int) -> Rehearsal:
    return rehearse(
        partial(Adapted, dim, rank),
        torch.zeros(2, dim),
        loss=lambda model, batch: model(batch),
        topology=topology,
        communication=options,
        micro_steps=micro_steps,
    )


@pytest.mark.rehearsal
@pytest.mark.parametrize("ranks", [64, 512])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_adapters_of_large_jobs_are_sent_without_padding(rank: int, ranks: int) -> None:
    topology = Topology(world_size=ranks, ranks_per_node=8, partition_size=ranks)
    sent = rehearsed(512, rank, topology, NODE, 2).sent()
    bound = 2 * adapter_bytes(512, rank) * (topology.nodes - 1) / topology.nodes
    assert bound <= 8 * sum(each.between_bytes for each in sent.values()) <= 1.05 * bound


@pytest.mark.rehearsal
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formulas_count_the_collectives_of_narrow_matrices(schedule: str) -> None:
    topology, options = Topology(world_size=32, ranks_per_node=4, partition_size=16), SCHEDULES[schedule]
    played: Counter[Collective] = Counter()
    for ran in rehearsed(48, 4, topology, options, 3).ran:
        played[ran.collective] += ran.times
    with torch.device("meta"):
        model = Adapted(48, 4)
    predicted: Counter[Collective] = Counter()
    for repeated in step_traffic(find_units(model, find_blocks(model)), topology, communication=options):
        predicted[repeated.collective] += repeated.in_step(3)
    assert played == predicted


@pytest.mark.rehearsal
@pytest.mark.parametrize("cached", ["never", "node"])
def test_formulas_count_the_memory_of_narrow_matrices(cached: Any) -> None:
    topology = Topology(world_size=64, ranks_per_node=8, partition_size=64)
    options = CommunicationOptions(cache_parameters=cached)
    work = measure_workload(
        partial(Adapted, 512, 4), torch.zeros(2, 512), samples=2, loss=lambda model, batch: model(batch)
    )
    closed = step_bytes(work, topology, options, samples=2, micro_steps=3)
    real = rehearsed(512, 4, topology, options, 3).peak_bytes
    by_rows = 64 // 4 * adapter_bytes(512, 4) // 2  # of the narrow matrices alone
    assert by_rows > 0.1 * real  # so that padding would be seen
    assert real <= closed <= 1.02 * real
