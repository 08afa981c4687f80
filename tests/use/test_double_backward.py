"""Weights that a backward needs again, or outside of its block's own backward: as in one process, nothing cached."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.trainers import cases_on_ranks
from tests.use.programs import (
    DIM,
    RANK,
    Block,
    Program,
    in_a_loop,
    in_fabric,
    in_trainer,
    largest_difference,
    mean_square,
    outcome,
    seeded,
)


def forces(program: Program, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (force,) = torch.autograd.grad(program.net(x).square().sum(), x, create_graph=True)
    return (force[:, :3] - y).square().mean()


def energy_and_forces(program: Program, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = program(x).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force.square().mean() + 0.1 * energy / len(x)


def gradient_penalty(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """As of WGAN-GP: the penalty first, then more forwards of the same blocks."""
    between = (0.3 * x + 0.7 * x.flip(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(program.net(between).sum(), between, create_graph=True)
    penalty = (gradient.norm(dim=1) - 1).square().mean()
    return program.net(x).mean() - program.net(x.flip(1)).square().mean() + penalty


def penalty_at_the_end(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """As R1: on the same inputs."""
    x = x.clone().requires_grad_()
    out = program.net(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return functional.mse_loss(out, y) + gradient.square().sum(1).mean()


def hessian_product(program: Program, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(program.net(x).tanh().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return second.square().mean()


def of_weights(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """A penalty on the gradients of weights; each process has those of its own samples, as under DDP."""
    own = list(program.parameters())
    per_sample = [mean_square(program, x[i : i + 2], y[i : i + 2]) for i in range(0, len(x), 2)]
    return sum(
        loss + 0.01 * sum(g.square().sum() for g in torch.autograd.grad(loss, own, create_graph=True))
        for loss in per_sample
    ) / len(per_sample)


def of_weights_used_directly(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """A penalty on the gradients of weights that one forward has used by a call, and another without."""
    block = program.net.blocks[0]
    per_sample = []
    for i in range(0, len(x), 2):
        hidden = block.encode(program.net.embed(x[i : i + 2])).square().mean()
        loss = mean_square(program, x[i : i + 2], y[i : i + 2]) + hidden
        (gradient,) = torch.autograd.grad(loss, block.up.weight, create_graph=True)
        per_sample.append(loss + 0.1 * gradient.square().sum())
    return sum(per_sample, start=x.new_zeros(())) / len(per_sample)


class Linear(nn.Linear):
    """A block without a nonlinearity: its second derivative reaches the weights, and not its output."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)


class Kept(Block):
    """Keeps a loss and returns nothing that leads to its weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.kept = self.down(self.encode(hidden)).square().mean()
        return hidden.detach()


class KeptAfter(Block):
    """Computes a loss after its output, with weights that only the loss needs."""

    def forward(self, hidden: Tensor) -> Tensor:
        output = hidden + self.encode(hidden)[:, :DIM]
        self.kept = self.down(torch.tanh(self.up(hidden))).square().mean()
        return output


class View(Block):
    """Returns a view, which the caller changes."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(hidden)[:, :DIM]


def kept_losses(program: Program, x: Tensor, y: Tensor) -> Tensor:
    return mean_square(program, x, y) + sum(block.kept for block in program.net.blocks)


def changed_views(program: Program, x: Tensor, y: Tensor) -> Tensor:
    net = program.net
    hidden = net.embed(x)
    for block in net.blocks:
        output = block(hidden)
        output += hidden
        hidden = output
    return functional.mse_loss(net.head(hidden), y)


CASES: dict[str, Any] = {  # use, block, way to train, options
    "forces": (forces, Block, in_trainer, {"validate": True}),
    "forces, manual": (forces, Block, in_trainer, {"manual": True}),
    "forces, cached": (forces, Block, in_a_loop, RANK),
    "forces, in Fabric": (forces, Block, in_fabric, {"window": 2}),
    "forces, units unused": (energy_and_forces, Block, in_a_loop, {"allow_unused": True}),
    "forces, not as a forward": (energy_and_forces, Block, in_a_loop, {"window": 2, "p": 4}),
    "energy and forces": (energy_and_forces, Block, in_trainer, {"window": 2}),
    "gradient penalty": (gradient_penalty, Block, in_a_loop, {}),
    "penalty at the end": (penalty_at_the_end, Block, in_a_loop, {}),
    "third derivatives": (hessian_product, Block, in_a_loop, {"steps": 4}),  # as little changes in each
    "gradients of weights": (of_weights, Block, in_trainer, {}),
    "gradients of weights used directly": (of_weights_used_directly, Block, in_a_loop, {}),
    "linear": (forces, Linear, in_a_loop, {}),
    "kept loss": (kept_losses, Kept, in_trainer, {}),
    "kept loss, in a window": (kept_losses, Kept, in_a_loop, {"window": 2}),
    "kept after the output": (kept_losses, KeptAfter, in_a_loop, {}),
    "changed views": (changed_views, View, in_a_loop, {}),
    "changed views, in a window": (changed_views, View, in_a_loop, {"window": 2, "p": 1}),
}


OF_FOUR = ("forces", "forces, in Fabric", "forces, not as a forward", "changed views, in a window")  # ranks


def run(folder: Path | None, case: str) -> Any:
    use, block, train, options = CASES[case]
    options = dict(options)
    program = seeded(use, block, manual=options.pop("manual", False))
    if train is in_trainer:
        options["folder"] = folder
    return outcome(lambda: train(program, **options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    four, two = (
        {case: partial(run, folder, case) for case in CASES if (case in OF_FOUR) == on_four}
        for on_four in (True, False)
    )
    return cases_on_ranks(four) | cases_on_ranks(two, world_size=2)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_there_whenever_a_backward_needs_them(case: str, trained: dict[str, list[Any]]) -> None:
    use, block, _, options = CASES[case]
    torch.manual_seed(0)
    alone = in_a_loop(Program(use, block), window=options.get("window", 1), steps=options.get("steps", 0))
    changed = largest_difference(alone, {n: v.detach() for n, v in seeded(use, block).state_dict().items()})
    assert changed > 1e-3
    for of_rank in trained[case]:
        assert not isinstance(of_rank, str), of_rank
        assert largest_difference(of_rank, alone) < 1e-5
