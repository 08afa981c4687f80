"""Blocks that change their input in place train as in one process, also where the caller uses the input again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.trainers import cases_on_ranks
from tests.use.programs import Block, Program, in_a_loop, largest_difference, mean_square, outcome, seeded


class ReluFirst(Block):
    """A pre-activation block."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.encode(functional.relu_(hidden)))


class ResidualReluFirst(Block):
    """As in residual networks: the changed input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.relu(hidden) + self.down(self.encode(hidden))


class AddsToInput(Block):
    """Adds to its input and returns it."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden += self.down(self.encode(hidden.exp()))
        return hidden


class Spoils(Block):
    """Changes what its own backward needs, which autograd does not allow."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden += self.down(self.encode(hidden))
        return hidden


class Scales(Block):
    """Changes its input by an operation whose second run would not be the same."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.encode(hidden.mul_(0.5)))


class OfTwo(Block):
    """Changes one of two inputs, given by name."""

    def forward(self, hidden: Tensor, *, other: Tensor) -> Tensor:
        return self.down(self.encode(hidden + other.relu_()))


class Columns(Block):
    """Changes a part of its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden[:, :2] *= 0.5
        return hidden + self.down(self.encode(hidden))


def used_again(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """The caller adds what the block has changed."""
    net = program.net
    hidden = net.embed(x)
    for block in net.blocks:
        hidden = block(hidden) + 0.5 * hidden
    return functional.mse_loss(net.head(hidden), y)


def of_two(program: Program, x: Tensor, y: Tensor) -> Tensor:
    net = program.net
    hidden, other = net.embed(x), 0.7 * net.embed(x)
    for block in net.blocks:
        hidden = block(hidden, other=other) + 0.5 * other
        other = other - 0.1
    return functional.mse_loss(net.head(hidden), y)


CASES: dict[str, Any] = {
    f"{block.__name__}, {use.__name__}": (use, block, options)
    for block, use, options in (
        (ReluFirst, mean_square, {}),
        (ReluFirst, used_again, {"window": 2}),
        (ReluFirst, used_again, {"cache_parameters": "rank"}),
        (ResidualReluFirst, mean_square, {}),
        (ResidualReluFirst, used_again, {"p": 4}),
        (AddsToInput, mean_square, {}),
        (Scales, used_again, {"p": 1}),
        (Scales, mean_square, {}),
        (Columns, used_again, {}),
        (OfTwo, of_two, {}),
        (Block, used_again, {}),
    )
}


def run(case: str) -> Any:
    use, block, options = CASES[case]
    return outcome(lambda: in_a_loop(seeded(use, block), **options))


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Any]]:
    four, two = (
        {case: partial(run, case) for case, (*_, options) in CASES.items() if ("p" in options) == on_four}
        for on_four in (True, False)
    )
    return cases_on_ranks(four) | cases_on_ranks(two | {"spoils": _spoil}, world_size=2)


def _spoil() -> Any:
    return outcome(lambda: in_a_loop(seeded(mean_square, Spoils)))


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_change_their_input_train_as_in_one_process(case: str, trained: dict[str, list[Any]]) -> None:
    use, block, options = CASES[case]
    torch.manual_seed(0)
    alone = in_a_loop(Program(use, block), window=options.get("window", 1))
    for of_rank in trained[case]:
        assert not isinstance(of_rank, str), of_rank
        assert largest_difference(of_rank, alone) < 1e-6


def test_a_change_of_what_autograd_has_saved_is_an_error_as_in_one_process(trained: dict[str, list[Any]]) -> None:
    expected = _spoil()
    assert "modified by an inplace operation" in expected
    for of_rank in trained["spoils"]:
        assert "modified by an inplace operation" in of_rank
