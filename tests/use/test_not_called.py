"""Blocks and weights that are used, but not by a call of the block, train as in one process."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_mics._torch.units.use_errors import described_errors
from tests.support.campaign import campaign
from tests.support.trainers import cases_on_ranks
from tests.use.programs import (
    BLOCKS,
    DIM,
    NODE,
    RANK,
    Program,
    batches,
    in_a_loop,
    in_fabric,
    in_trainer,
    largest_difference,
    mean_square,
    outcome,
    seeded,
    weights,
)


def through(step: Any) -> Any:
    """A loss of the model with ``step(blocks, i, hidden)`` in place of ``blocks[i](hidden)``."""

    def use(program: Program, x: Tensor, y: Tensor) -> Tensor:
        net = program.net
        hidden = net.embed(x)
        for index in range(BLOCKS):
            hidden = step(net.blocks, index, hidden)
        return functional.mse_loss(net.head(hidden), y)

    return use


def with_penalty(penalty: Any) -> Any:
    def use(program: Program, x: Tensor, y: Tensor) -> Tensor:
        loss = mean_square(program, x, y)
        return loss + 0.01 * penalty(program, loss)

    return use


def after_an_attack(program: Program, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_square(program, x, y), x)
    return mean_square(program, x.detach() + 0.1 * gradient.sign(), y)


class Product(torch.autograd.Function):
    """A linear layer with a backward of its own, inside of which autograd records nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


def trained_late(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """A weight that requires a gradient from the second micro-step on only, where it is used directly."""
    program.steps = getattr(program, "steps", 0) + 1
    for block in program.net.blocks:
        block.up.weight.requires_grad_(program.steps > 1)
    return USES["linear"](program, x, y)


USES: dict[str, Any] = {
    "forward": through(lambda blocks, i, x: blocks[i].forward(x)),
    "encode": through(lambda blocks, i, x: x + blocks[i].down(blocks[i].encode(x))),
    "linear": through(lambda blocks, i, x: blocks[i](x) + functional.linear(x, blocks[i].up.weight)[:, :DIM]),
    "transposed": through(lambda blocks, i, x: blocks[i](x) + 0.1 * (x @ blocks[i].up.weight.t())[:, :DIM]),
    "of another block": through(lambda blocks, i, x: blocks[i](x) + blocks[(i + 1) % BLOCKS].encode(x)[:, :DIM]),
    "factor": through(lambda blocks, i, x: blocks[i](x) * (1 + blocks[i].down.bias)),
    "not in place": through(
        lambda blocks, i, x: blocks[i](x) + ((blocks[i].up.weight * 2) + torch.ones(2 * DIM + 1, DIM)).mean(0)
    ),
    "listed": through(lambda blocks, i, x: blocks[i](torch.cat([x, blocks[i].down.bias.expand_as(x)], 1)[:, :DIM])),
    "row": through(lambda blocks, i, x: blocks[i](x) + blocks[i].up.weight[3]),
    "rows": through(lambda blocks, i, x: x + x @ blocks[i].up.weight[:DIM].t()),
    "rows in turn": through(lambda blocks, i, x: x + sum(x * row for row in blocks[i].up.weight)),
    "batched": through(
        lambda blocks, i, x: torch.baddbmm(
            blocks[i].down.bias, x[:, None], blocks[i].up.weight[:DIM].t().expand(len(x), DIM, DIM)
        )[:, 0]
    ),
    "sample by sample": through(lambda blocks, i, x: torch.stack([one + one * blocks[i].up.weight[2] for one in x])),
    "function": through(lambda blocks, i, x: x + Product.apply(x, blocks[i].up.weight)[:, :DIM]),
    "trained late": trained_late,
    "called": through(lambda blocks, i, x: blocks[i](x)),
    "attack": after_an_attack,
    "penalty": with_penalty(lambda program, _: sum(p.square().sum() for p in program.parameters())),
    "norms": with_penalty(lambda program, _: torch.stack([p.norm() for p in program.parameters()]).sum()),
    "by loss": with_penalty(lambda program, loss: loss.detach() * sum(p.abs().sum() for p in program.parameters())),
    "by torch.func": with_penalty(
        lambda program, loss: (
            torch.func.grad(torch.square)(loss.detach()) * sum(p.abs().sum() for p in program.parameters())
        )
    ),
    "orthogonal": with_penalty(
        lambda program, _: sum(
            (b.down.weight @ b.down.weight.t() - torch.eye(DIM)).square().sum() for b in program.net.blocks
        )
    ),
    "only a penalty": lambda program, x, y: sum(p.square().sum() for p in program.net.blocks.parameters()),
}

STEPS_OF = {"trained late": {"steps": 3}}

OF_TWO: dict[str, Any] = {f"{use}, in a loop": (use, in_a_loop, STEPS_OF.get(use, {})) for use in USES} | {
    "encode, alone in a group": ("encode", in_a_loop, {"window": 2, "p": 1}),
    "penalty, cached on each rank": ("penalty", in_a_loop, {"window": 2, **RANK}),
    "attack, in a Trainer": ("attack", in_trainer, {}),
}

OF_FOUR: dict[str, Any] = {
    "encode, a window": ("encode", in_a_loop, {"window": 2}),
    "penalty, cached on each node": ("penalty", in_a_loop, {"window": 2, "p": 4, **NODE}),
    "by loss, in a Trainer's window": ("by loss", in_trainer, {"window": 2, **RANK}),
    "called, in Fabric": ("called", in_fabric, {"window": 2}),
}

IN_CAMPAIGN: dict[str, Any] = {
    "encode, cached on each node": ("encode", in_a_loop, {"window": 2, "p": 4, **NODE}),
    "penalty, one group": ("penalty", in_a_loop, {"window": 2, "p": 4}),
    "encode, one group": ("encode", in_a_loop, {"window": 2, "p": 4}),
    "encode, cached on each rank": ("encode", in_a_loop, {"window": 2, **RANK}),
    "penalty, a window": ("penalty", in_a_loop, {"window": 2}),
    "penalty, alone in a group": ("penalty", in_a_loop, {"window": 2, "p": 1}),
}

CASES = OF_TWO | OF_FOUR | IN_CAMPAIGN  # ways to train by name: (use, function of the program, options)


def run(folder: Path, case: str) -> Any:
    use, train, options = CASES[case]
    if train is in_trainer:
        options = {**options, "folder": folder}
    return outcome(lambda: train(seeded(USES[use]), **options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    on_two, on_four = (
        {case: partial(run, folder, case) for case in cases}
        for cases in (OF_TWO, OF_FOUR | IN_CAMPAIGN if in_campaign else OF_FOUR)
    )
    others = OTHERS | {"after a fit": partial(_after_the_fit, folder)}
    return cases_on_ranks(on_two | others, world_size=2) | cases_on_ranks(on_four)


@pytest.mark.parametrize("case", [*OF_TWO, *OF_FOUR, *map(campaign, IN_CAMPAIGN)])
def test_use_without_a_call_trains_as_in_one_process(case: str, trained: dict[str, list[Any]]) -> None:
    use, _, options = CASES[case]
    alone = in_a_loop(seeded(USES[use]), window=options.get("window", 1), steps=options.get("steps", 0))
    for of_rank in trained[case]:
        assert not isinstance(of_rank, str), of_rank
        assert largest_difference(of_rank, alone) < 1e-6


def _after_the_fit(folder: Path) -> Any:
    """Whether direct use after a fit gives what the whole weights give, and leaves the shards shown."""
    program = seeded(mean_square)
    in_trainer(program, folder)
    x = batches()[0][0]
    with torch.no_grad():
        hidden = program.net.embed(x)
        found = functional.linear(hidden, program.net.blocks[0].up.weight) + program.net.blocks[0].up.bias
    whole = weights(program)
    expected = functional.linear(x, whole["net.embed.weight"], whole["net.embed.bias"])
    expected = functional.linear(expected, whole["net.blocks.0.up.weight"], whole["net.blocks.0.up.bias"])
    called_alone = program.net.blocks[1](hidden)
    shown = {type(parameter).__name__ for parameter in program.parameters()}
    return float((found - expected).abs().max()), shown, bool(called_alone.requires_grad)


def first_a_block(program: Program, x: Tensor, y: Tensor) -> Tensor:
    return program.net.blocks[0](program.net.embed(x)).square().mean() + functional.mse_loss(program(x), y)


def _block_before_the_root() -> Any:
    return in_a_loop(seeded(first_a_block))


def changes_a_sharded_tensor(program: Program, x: Tensor, y: Tensor) -> Tensor:
    changed = program.net.blocks[1].up.weight * 2
    changed += functional.linear(x.new_ones(2 * DIM + 1, 4), program.net.embed.weight)
    return changed.sum()


def writes_to_a_sharded_tensor(program: Program, x: Tensor, y: Tensor) -> Tensor:
    weight = program.net.blocks[1].up.weight.detach()
    with described_errors():
        return torch.mul(weight, x.new_ones(2 * DIM + 1, DIM), out=torch.empty_like(weight))


def _rejected() -> Any:
    return [outcome(partial(in_a_loop, seeded(use))) for use in (changes_a_sharded_tensor, writes_to_a_sharded_tensor)]


OTHERS: dict[Any, Any] = {
    "before the root": _block_before_the_root,
    "rejected": _rejected,
}


def test_a_block_may_run_before_the_root(trained: dict[str, list[Any]]) -> None:
    alone = in_a_loop(seeded(first_a_block))
    for of_rank in trained["before the root"]:
        assert largest_difference(of_rank, alone) < 1e-6


def test_what_cannot_mix_names_the_tensor_and_the_line(trained: dict[str, list[Any]]) -> None:
    for changed, written in trained["rejected"]:
        assert re.match(r"RuntimeError: .*test_not_called.py:\d+: aten.add_.* a tensor of \(13, 6\), sharded", changed)
        assert re.match(r"RuntimeError: .*test_not_called.py:\d+: aten.mul.out .*`parameter.full_tensor\(\)`", written)
        assert "got mixed" not in changed + written


def test_direct_use_after_a_fit_gathers_the_weights(trained: dict[str, list[Any]]) -> None:
    for difference, shown, has_gradient in trained["after a fit"]:
        assert difference < 1e-6
        assert shown == {"DTensor"}
        assert has_gradient
