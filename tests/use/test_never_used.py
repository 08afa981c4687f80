"""Parameters that no loss uses keep no gradient in accumulation windows, and no optimizer changes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from tests.support.forked import run_cases
from tests.support.recorded import RecordCollectives

DIM, STEPS, RANKS = 6, 4, 4

LAYOUTS: dict[str, tuple[int, CommunicationOptions]] = {
    "p=1": (1, CommunicationOptions.PAPER),
    "p=2": (2, CommunicationOptions.PAPER),
    "p=4, node": (4, CommunicationOptions.NODE),
}  # without accumulation that defers a reduction, ranks that use other parameters of a block are an error


class Block(nn.Module):
    """One parameter for each way of use, in one parameter group."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(DIM, DIM)
        self.never = nn.Parameter(torch.ones(5))
        self.by_one_rank = nn.Parameter(torch.ones(DIM))  # in each window, before its boundary
        self.late = nn.Parameter(torch.ones(DIM))  # from the third window on

    def forward(self, x: Tensor, rank: int, step: int, micro_step: int) -> Tensor:
        x = x + torch.tanh(self.always(x))
        if rank == 1 and micro_step == 0:
            x = x * self.by_one_rank
        return x * self.late if step >= 2 else x


class Network(nn.Module):
    def __init__(self, *, all_used: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.all_used = all_used

    def forward(self, x: Tensor, *use: int) -> Tensor:
        for block in self.blocks:
            x = block(x, *use)
        unused = sum(block.never.sum() + block.late.sum() + block.by_one_rank.sum() for block in self.blocks)
        return x.square().mean() + (unused if self.all_used else 0.0)


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options)


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def in_job(name: str, micro_steps: int) -> Any:
    """Weights after all steps, whole, and in each step the parameters without a gradient."""
    partition_size, options = LAYOUTS[name]
    model, rank = network(), dist.get_rank()
    topology = Topology(world_size=RANKS, ranks_per_node=2, partition_size=partition_size)
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    optimizer, without = optimizer_of(model), []
    for step in range(STEPS):
        for micro_step in range(micro_steps):
            with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                (model(batch(rank, step, micro_step), rank, step, micro_step) / micro_steps).backward()
        without.append([key for key, p in model.named_parameters() if p.grad is None])
        optimizer.step()
        optimizer.zero_grad()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    return {key: w.full_tensor() if isinstance(w, DTensor) else w for key, w in weights.items()}, without


def alone(micro_steps: int) -> Any:
    model = network()
    optimizer, without = optimizer_of(model), []
    for step in range(STEPS):
        for micro_step in range(micro_steps):
            for rank in range(RANKS):
                loss = model(batch(rank, step, micro_step), rank, step, micro_step)
                (loss / micro_steps / RANKS).backward()
        without.append([key for key, p in model.named_parameters() if p.grad is None])
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), without


def kept() -> Any:
    """A gradient that exists when a window begins is kept: without a call of ``zero_grad``."""
    model = network()
    topology = Topology(world_size=RANKS, ranks_per_node=2, partition_size=2)
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"))
    never: Any = model.blocks[0].never
    never.grad = torch.ones_like(never)
    for micro_step in range(2):
        with schedule.micro_step(boundary=micro_step == 1):
            model(batch(dist.get_rank(), 0, micro_step), 0, 0, micro_step).backward()
    assert model.blocks[1].never.grad is None
    return never.grad.full_tensor()


def compared(all_used: bool) -> list[int]:
    """How often ranks met in each window beyond the first, which is new to all of them."""
    model = network(all_used=all_used)
    topology = Topology(world_size=RANKS, ranks_per_node=2, partition_size=2)
    groups = create_partition_groups(topology, device_type="cpu")
    schedule = shard_model(model, groups)
    calls: list[int] = []
    any_of, groups.control.any_of = groups.control.any_of, lambda *args: calls.append(1) or any_of(*args)
    counts = []
    for step in range(3):
        calls.clear()
        with RecordCollectives() as recorded:
            for micro_step in range(2):
                with schedule.micro_step(boundary=micro_step == 1):
                    model(batch(dist.get_rank(), step, micro_step), 0, 0, micro_step).backward()
        assert recorded.seen
        counts.append(len(calls))
        model.zero_grad()
    del groups.control.any_of
    return counts


@pytest.fixture(scope="module")
def runs() -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {(name, s): partial(in_job, name, s) for name in LAYOUTS for s in (2, 3)}
    cases |= {("all used", used): partial(compared, used) for used in (True, False)}
    return run_cases(RANKS, {**cases, "kept": kept})


@pytest.mark.parametrize("micro_steps", [2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_without_a_loss_train_as_in_one_process(
    name: str, micro_steps: int, runs: dict[Any, list[Any]]
) -> None:
    expected, without = alone(micro_steps)
    for weights, found in runs[name, micro_steps]:
        assert found == without
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key].detach(), atol=1e-6, rtol=0)
    assert without[0] == ["blocks.0.never", "blocks.0.late", "blocks.1.never", "blocks.1.late"]
    assert without[-1] == ["blocks.0.never", "blocks.1.never"]


def test_a_gradient_from_before_the_window_is_kept(runs: dict[Any, list[Any]]) -> None:
    assert all(torch.equal(value, torch.ones(5)) for value in runs["kept"])


def test_ranks_compare_in_the_first_window_only_if_all_parameters_are_used(runs: dict[Any, list[Any]]) -> None:
    assert runs["all used", True] == [[1, 0, 0]] * RANKS
    assert runs["all used", False] == [[1, 1, 1]] * RANKS
