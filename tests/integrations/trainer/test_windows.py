"""What an accumulation window has summed up when it is abandoned does not reach the next fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest.mock import MagicMock, patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mics import CommunicationOptions
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from tests.support.campaign import campaign
from tests.support.forked import Run
from tests.support.models import OneBlock, TinyModule, tokens
from tests.support.trainers import make_trainer, mics

RANKS = 4


WINDOW = 3


SAMPLES = tokens(16 * WINDOW, seed=8)  # two per rank and micro-step


FIRST, SECOND = SAMPLES[: 8 * WINDOW], SAMPLES[8 * WINDOW :]


class Automatic(TinyModule):
    """Records its full gradients of each step."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.net.embed.weight.grad is not None:  # None inside a window, where gradients are pending
            self.steps.append({name: p.grad.full_tensor() for name, p in self.net.named_parameters()})


class ByHand(Automatic):
    """Two optimizers: the first steps inside the second one's windows, so the fit may end while one is open."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=0.0), torch.optim.SGD(self.parameters(), lr=self.lr)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        counting, real = self.optimizers()
        boundary = (batch_idx + 1) % WINDOW == 0
        with real.toggle_model(sync_grad=boundary):
            self.manual_backward(self(batch) / WINDOW)
        if boundary:
            real.step()
            real.zero_grad()
        elif (batch_idx + 1) % WINDOW == 2:
            counting.step()


class StopAfterTwo(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 1


class RaiseAfterTwo(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise ArithmeticError("in the middle of a window")


ENDS: dict[str, tuple[type[Automatic], dict[str, Any]]] = {
    "should_stop": (Automatic, {"accumulate_grad_batches": WINDOW, "callbacks": [StopAfterTwo()]}),
    "an exception": (Automatic, {"accumulate_grad_batches": WINDOW, "callbacks": [RaiseAfterTwo()]}),
    "max_steps": (ByHand, {"max_steps": 1, "max_epochs": -1}),
}


def fit_twice(folder: str, options_of_strategy: dict[str, Any], guarded: bool, ends: list[str]) -> dict[str, Any]:
    def trainer(**options: Any) -> pl.Trainer:
        return make_trainer(folder, strategy=mics(**options_of_strategy), use_distributed_sampler=False, **options)

    with nullcontext() if guarded else dropping_nothing():
        return {end: first_gradients_of_the_second_fit(trainer, *ENDS[end]) for end in ends}


def dropping_nothing() -> Any:
    """In place of what drops gradients of a window; the Trainer begins with `zero_grad()`."""
    return patch.multiple(AccumulationWindow, abandon=MagicMock(), drop_pending_gradients=MagicMock())


def first_gradients_of_the_second_fit(
    make: Callable[..., pl.Trainer], kind: type[Automatic], options: dict[str, Any]
) -> Any:
    torch.manual_seed(0)
    module = kind()
    first = make(**options)
    try:
        first.fit(module, loader_of(FIRST))
    except ArithmeticError:
        assert options["callbacks"]
    fitted, steps = first.fit_loop.epoch_loop.batch_progress.total.ready, len(module.steps)
    accumulate = {key: value for key, value in options.items() if key == "accumulate_grad_batches"}
    make(**accumulate).fit(module, loader_of(SECOND))
    return fitted, steps, module.steps[-1]


def loader_of(samples: Tensor) -> DataLoader[Any]:
    return DataLoader(samples[dist.get_rank() :: RANKS], batch_size=2)


KEPT = {
    "nothing kept": {"partition_size": 2, **CommunicationOptions.PAPER.keywords()},
    "kept by nodes": {"partition_size": 4, **CommunicationOptions.NODE.keywords()},
    "kept by ranks": {"partition_size": 2, **CommunicationOptions.RANK.keywords()},
}


UNGUARDED = list(zip(KEPT, ENDS, strict=True))  # one end of each


@pytest.fixture(scope="module")
def first_gradients(
    tmp_path_factory: pytest.TempPathFactory, on_shared_ranks: Run, in_campaign: bool
) -> dict[Any, dict[str, Any]]:
    """By what is kept, and whether windows are dropped, what rank 0 has returned of each end."""
    found: dict[Any, dict[str, Any]] = {}
    for kept, options in KEPT.items():
        folder, without = str(tmp_path_factory.mktemp("fit")), [end for of, end in UNGUARDED if of == kept]
        found[kept, True] = on_shared_ranks(fit_twice, folder, options, True, list(ENDS))[0]
        found[kept, False] = on_shared_ranks(fit_twice, folder, options, False, list(ENDS) if in_campaign else without)[
            0
        ]
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Gradients of the second fit's only window; the weights are still the first ones."""
    torch.manual_seed(0)
    model = OneBlock()
    model(SECOND).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - gradient).abs().max()) for name, gradient in theirs.items())


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("end", ENDS)
def test_an_abandoned_window_does_not_leak_into_the_next_fit(
    end: str, kept: str, first_gradients: dict[Any, dict[str, Any]], expected: dict[str, Tensor]
) -> None:
    micro_steps, steps, gradients = first_gradients[kept, True][end]
    assert (micro_steps, steps) == (2, 0)
    assert largest_difference(gradients, expected) < 1e-6


@pytest.mark.parametrize(
    ("kept", "end"), [case if case in UNGUARDED else campaign(*case) for case in product(KEPT, ENDS)]
)
def test_it_would_leak_if_nothing_dropped_it(
    kept: str, end: str, first_gradients: dict[Any, dict[str, Any]], expected: dict[str, Tensor]
) -> None:
    assert largest_difference(first_gradients[kept, False][end][2], expected) > 1e-3
