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
from tests.support.trainers import cases_on_ranks
from tests.use.programs import (
    DIM,
    NODE,
    RANK,
    STEPS,
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
        for index in range(3):
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
    """A weight that requires a gradient from the third micro-step on only, where it is used directly."""
    program.steps = getattr(program, "steps", 0) + 1
    for block in program.net.blocks:
        block.up.weight.requires_grad_(program.steps > 2)
    return USES["linear"](program, x, y)


USES: dict[str, Any] = {
    "forward": through(lambda blocks, i, x: blocks[i].forward(x)),
    "encode": through(lambda blocks, i, x: x + blocks[i].down(blocks[i].encode(x))),
    "linear": through(lambda blocks, i, x: blocks[i](x) + functional.linear(x, blocks[i].up.weight)[:, :DIM]),
    "transposed": through(lambda blocks, i, x: blocks[i](x) + 0.1 * (x @ blocks[i].up.weight.t())[:, :DIM]),
    "of another block": through(lambda blocks, i, x: blocks[i](x) + blocks[(i + 1) % 3].encode(x)[:, :DIM]),
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
    "orthogonal": with_penalty(
        lambda program, _: sum(
            (b.down.weight @ b.down.weight.t() - torch.eye(DIM)).square().sum() for b in program.net.blocks
        )
    ),
    "only a penalty": lambda program, x, y: sum(p.square().sum() for p in program.net.blocks.parameters()),
}

STEPS_OF = {"trained late": STEPS}  # the second step of others shows what the first has left behind, momentum too


def cases(folder: Path) -> dict[str, Any]:
    """Ways to train by name: (use, function of the program, options)."""
    every: dict[str, Any] = {f"{use}, in a loop": (use, in_a_loop, {"steps": STEPS_OF.get(use, 2)}) for use in USES}
    every |= {
        f"{use}, {name}": (use, in_a_loop, {"window": 2, **options})
        for use in ("encode", "penalty")
        for name, options in {
            "a window": {},
            "cached on each rank": RANK,
            "cached on each node": {"p": 4, **NODE},
            "alone in a group": {"p": 1},
            "one group": {"p": 4},
        }.items()
    }
    trainer = partial(in_trainer, folder=folder)
    every |= {f"{use}, in a Trainer": (use, trainer, {}) for use in ("attack",)}
    every |= {f"{use}, in a Trainer's window": (use, trainer, {"window": 2, **RANK}) for use in ("by loss",)}
    every |= {f"{use}, in Fabric": (use, in_fabric, {"window": 2}) for use in ("called",)}
    return every


def run(folder: Path, case: str) -> Any:
    use, train, options = cases(folder)[case]
    return outcome(lambda: train(seeded(USES[use]), **options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return cases_on_ranks({case: partial(run, folder, case) for case in cases(folder)} | OTHERS)


@pytest.mark.parametrize("case", cases(Path()))
def test_use_without_a_call_trains_as_in_one_process(case: str, trained: dict[str, list[Any]]) -> None:
    use, _, options = cases(Path())[case]
    alone = in_a_loop(seeded(USES[use]), window=options.get("window", 1), steps=options.get("steps", STEPS))
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


def test_direct_use_after_a_fit_gathers_the_weights(tmp_path: Path) -> None:
    for difference, shown, has_gradient in cases_on_ranks({"fit": partial(_after_the_fit, tmp_path)}, world_size=2)[
        "fit"
    ]:
        assert difference < 1e-6
        assert shown == {"DTensor"}
        assert has_gradient
