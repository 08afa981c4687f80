"""``torch.optim.Muon`` on a sharded model: one process's numbers, each matrix orthogonalized once, few bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.optim._muon as torch_muon
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch.dtensors.owned_rows import OwnedRows
from tests.support.forked import run_cases
from tests.support.models import TinyLM, tokens

LAYERS, STEPS, LR = 3, 6, 0.02
NODE, PAPER = CommunicationOptions.NODE, CommunicationOptions.PAPER
ITERATION = torch_muon._zeropower_via_newtonschulz


def in_float32(update: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """torch's iteration without its rounding to bfloat16."""
    a, b, c = coefficients
    x = update.T if update.size(0) > update.size(1) else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if update.size(0) > update.size(1) else x


def network() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(layers=LAYERS)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR, eps=1e-3)]


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            one, other = args[-2:]
            self.flops += 2 * one.size(0) * one.size(1) * other.size(1)
        return func(*args, **(kwargs or {}))


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return tokens(2, seed=1000 * step + 100 * micro_step + rank)


Changes = Callable[[nn.Module, int], None]


def clip(model: nn.Module, _step: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05, error_if_nonfinite=True)


def clip_values(model: nn.Module, _step: int) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.001)


def look(model: nn.Module, step: int) -> None:
    """What code between backward and step may do with gradients."""
    for parameter in model.parameters():
        if step % 2:
            parameter.grad.add_(parameter, alpha=0.1)
        else:
            parameter.grad = parameter.grad * 0.5


def leave_out(model: nn.Module, step: int) -> None:
    if step == 2:
        model.get_parameter("blocks.1.up.weight").grad = None


def train(
    size: int, options: CommunicationOptions, micro_steps: int, *, nodes: int = 2, change: Changes | None = None
) -> dict[str, Any]:
    topology = Topology(world_size=4, ranks_per_node=4 // nodes, partition_size=size)
    model = network()
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    both = optimizers(model)
    sent, products, weights, held = [0.0], Products(), [], 0
    for step in range(STEPS):
        for micro_step in range(micro_steps):
            with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                (model(batch(dist.get_rank(), step, micro_step)) / micro_steps).backward()
        held += sum(isinstance(p.grad, OwnedRows) and p.grad.held is not None for p in model.parameters())
        if change is not None:
            change(model, step)
        with products:
            for optimizer in both:
                optimizer.step()
        for optimizer in both:
            optimizer.zero_grad()
        by_technique = schedule.traffic.by_technique()
        sent.append(sum(each.between_bytes for each in by_technique.values()))
        weights.append(whole(model))
    return {
        "weights": weights,
        "sent": [after - before for before, after in pairwise(sent)],
        "flops": products.flops,
        "held": held,
        "momentum": sum(
            state["momentum_buffer"].held.numel() for state in both[0].state.values() if state["momentum_buffer"].held is not None
        ),
        "techniques": {name: each.between_bytes for name, each in by_technique.items()},
    }


def alone(micro_steps: int, *, change: Changes | None = None, backwards: bool = False) -> list[dict[str, Tensor]]:
    model = network()
    both, weights = optimizers(model), []
    for step in range(STEPS):
        batches = [batch(rank, step, micro_step) for micro_step in range(micro_steps) for rank in range(4)]
        for each in reversed(batches) if backwards else batches:
            (model(each) / micro_steps / 4).backward()
        if change is not None:
            change(model, step)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    return weights


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


@contextmanager
def iteration(function: Callable[..., Tensor]) -> Any:
    torch_muon._zeropower_via_newtonschulz = function
    try:
        yield
    finally:
        torch_muon._zeropower_via_newtonschulz = ITERATION


def with_iteration(function: Callable[..., Tensor], case: Callable[[], Any]) -> Any:
    with iteration(function):
        return case()


CASES: dict[str, tuple[Callable[[], Any], int, Changes | None]] = {
    f"{size} ranks on {nodes} nodes, {name}, {micro_steps} micro-steps{', ' + change.__name__ if change else ''}": (
        partial(train, size, options, micro_steps, nodes=nodes, change=change),
        micro_steps,
        change,
    )
    for nodes, size, name, options, micro_steps, change in [
        *((2, size, name, options, s, None) for size in (1, 2, 4) for name, options in (("node", NODE), ("paper", PAPER)) for s in (1, 2)),
        *((2, 4, "rank", CommunicationOptions.RANK, s, None) for s in (1, 2)),
        *((nodes, size, "node", NODE, 2, None) for nodes, size in ((1, 1), (1, 2), (1, 4), (4, 1), (4, 2), (4, 4))),
        *((2, size, "node", NODE, 2, change) for size in (1, 2, 4) for change in (clip, clip_values, look, leave_out)),
    ]
}


@pytest.fixture(scope="module")
def results() -> Any:
    return run_cases(4, {name: partial(with_iteration, in_float32, case) for name, (case, _, _) in CASES.items()})


@pytest.fixture(scope="module")
def references() -> Any:
    with iteration(in_float32):
        kinds = {(micro_steps, change) for _, micro_steps, change in CASES.values()}
        return {kind: alone(kind[0], change=kind[1]) for kind in kinds}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_one_process_on_all_ranks(name, results, references):
    _, micro_steps, change = CASES[name]
    ranks = results[name]
    for step, reference in enumerate(references[micro_steps, change]):
        for key, value in reference.items():
            torch.testing.assert_close(ranks[0]["weights"][step][key], value, rtol=0, atol=5e-6)
            assert all(torch.equal(of_rank["weights"][step][key], ranks[0]["weights"][step][key]) for of_rank in ranks)


@pytest.mark.parametrize("name", CASES)
def test_each_matrix_is_orthogonalized_once_in_the_job(name, results):
    with iteration(in_float32), Products() as products:
        for matrix in (p for p in network().parameters() if p.dim() == 2):
            pass
        total = 0
    assert sum(of_rank["flops"] for of_rank in results[name]) > 0
