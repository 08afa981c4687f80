"""Lightning's callbacks: those that cannot work on shards are rejected before a fit, and evaluations run with any."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelPruning,
    Timer,
)
from lightning.pytorch.loggers import Logger

from tests.support.fits import refusal
from tests.support.models import TinyModule, loader_of_tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics


def made(kind: type[Callback]) -> Callback:
    options: dict[Any, dict[str, Any]] = {
        ModelPruning: {"pruning_fn": "l1_unstructured", "amount": 0.5},
    }
    return kind(**options.get(kind, {}))


def fit(kind: type[Callback]) -> tuple[str, bool]:
    module = TinyModule()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, callbacks=[made(kind)], devices=2, strategy=mics())
        message = refusal(partial(trainer.fit, module, loader_of_tokens(4)))
    return message, "_mics" in vars(module)


def evaluate(kind: type[Callback]) -> tuple[list[float], int]:
    torch.manual_seed(0)
    module = TinyModule()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, callbacks=[made(kind)], devices=2, strategy=mics())
        losses = [
            trainer.validate(module, loader_of_tokens(4), verbose=False)[0]["val_loss"],
            trainer.test(module, loader_of_tokens(4), verbose=False)[0]["test_loss"],
        ]
        predicted = trainer.predict(module, loader_of_tokens(4))
    assert predicted is not None
    return losses, len(predicted)


class Failing(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyError("the user's own")


def callbacks_after() -> list[bool]:
    """Whether a Trainer has the callbacks it had: after a fit, another, an evaluation, and a fit that failed."""
    had = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder, callbacks=[Timer(), LearningRateMonitor()], devices=2, strategy=mics(), logger=Lines()
        )
        given = list(trainer.callbacks)
        for run in (trainer.fit, trainer.fit, trainer.validate):
            run(TinyModule(), loader_of_tokens(4))
            had.append(trainer.callbacks == given)
        failing = make_trainer(folder, callbacks=[Failing()], devices=2, strategy=mics())
        given = list(failing.callbacks)
        assert "the user's own" in refusal(partial(failing.fit, TinyModule(), loader_of_tokens(4)))
        return [*had, failing.callbacks == given]


class Lines(Logger):
    name = version = "lines"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Drop them."""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Drop them."""


@pytest.fixture(scope="module")
def results() -> dict[Any, list[Any]]:
    fits = {("fit", ModelPruning): partial(fit, ModelPruning)}
    evaluations = {("evaluate", kind): partial(evaluate, kind) for kind in (Timer, EMAWeightAveraging, ModelPruning)}
    return cases_on_ranks({**fits, **evaluations, "after": callbacks_after}, world_size=2)


def test_callbacks_that_replace_parameters_are_rejected_on_all_ranks_before_sharding(
    results: dict[Any, list[Any]],
) -> None:
    ((message, was_sharded),) = set(results["fit", ModelPruning])
    assert message.startswith("MisconfigurationException: ModelPruning ")
    assert message.endswith(
        "set weights to zero in `on_train_batch_end`, as in `parameter.mul_(parameter.abs() > threshold)`"
    )
    assert not was_sharded


@pytest.mark.parametrize("kind", [EMAWeightAveraging, ModelPruning])
def test_evaluations_run_with_callbacks_of_fits(kind: type[Callback], results: dict[Any, list[Any]]) -> None:
    assert results["evaluate", kind] == results["evaluate", Timer]


def test_a_trainer_has_the_callbacks_that_it_was_given_after_each_run(results: dict[Any, list[Any]]) -> None:
    assert results["after"] == [[True] * 4] * 2
