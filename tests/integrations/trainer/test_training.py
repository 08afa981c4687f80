"""Gradients and weights of a Trainer run are those of one process that sees the batches of all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support.models import OneBlock, TinyModule, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import make_trainer, mics, on_ranks

LR = 0.5


RANKS = 4


UNITS = 2  # a block and the root


SAMPLES = tokens(40, seed=5)  # two per rank and micro-step: five micro-steps


NORM, VALUE = 0.2, 0.02


# what a rank gets in micro-step m is every fourth sample, so all ranks together get a contiguous slice
EVERY_STEP = [(SAMPLES[start : start + 8], 1.0) for start in range(0, 40, 8)]


# Lightning divides by the full window in the shorter one at the end of an epoch, too (its issue 19987)
IN_WINDOWS_OF_TWO = [(SAMPLES[:16], 1.0), (SAMPLES[16:32], 1.0), (SAMPLES[32:], 0.5)]


RUNS: dict[str, dict[str, Any]] = {
    "every step": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "over two nodes": {"accumulate_grad_batches": 2, "strategy": {"partition_size": 4}},
    "clipped by norm": {"gradient_clip_val": NORM},
    "clipped by value": {"gradient_clip_val": VALUE, "gradient_clip_algorithm": "value"},
}


@dataclass
class Run:
    """What one rank saw of a fit: full gradients per step before and after clipping, and all-reduces per micro-step."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    all_reduces: list[int] = field(default_factory=list)


class Observed(TinyModule):
    def __init__(self) -> None:
        super().__init__(lr=LR, kind=OneBlock)
        self.run, self.collectives = Run(), RecordCollectives()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.collectives.seen.clear()

    def on_after_backward(self) -> None:
        replicas = self.trainer.strategy.topology.replication_group(self.global_rank)
        self.run.all_reduces.append(len(self.collectives.of("all_reduce", replicas)) if len(replicas) > 1 else 0)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.run.gradients.append(full_gradients(self.net))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.run.clipped.append(full_gradients(self.net))


def full_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def fit_each_way(folder: str) -> dict[str, Run]:
    return {name: fit(folder, **options) for name, options in RUNS.items()}


def fit(folder: str, *, strategy: dict[str, Any] | None = None, **options: Any) -> Run:
    torch.manual_seed(dist.get_rank())  # a seed of its own for every rank: the weights of rank 0 count
    module = Observed()
    trainer = make_trainer(folder, strategy=mics(**strategy or {}), use_distributed_sampler=False, **options)
    with module.collectives:
        trainer.fit(module, DataLoader(SAMPLES[dist.get_rank() :: RANKS], batch_size=2))
    module.run.weights = {name: p.full_tensor() for name, p in module.net.named_parameters()}
    return module.run


def train_in_one_process(windows: Iterable[tuple[Tensor, float]], clip: Callable[..., Any] | None = None) -> Run:
    torch.manual_seed(0)
    model, run = OneBlock(), Run()
    for batch, share in windows:
        model.zero_grad()
        (model(batch) * share).backward()
        run.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        if clip:
            clip(model.parameters())
        run.clipped.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    run.weights = dict(model.named_parameters())
    return run


ONE_PROCESS: dict[str, Callable[[], Run]] = {
    "every step": partial(train_in_one_process, EVERY_STEP),
    "accumulated": partial(train_in_one_process, IN_WINDOWS_OF_TWO),
    "over two nodes": partial(train_in_one_process, IN_WINDOWS_OF_TWO),
    "clipped by norm": partial(
        train_in_one_process, EVERY_STEP, partial(torch.nn.utils.clip_grad_norm_, max_norm=NORM)
    ),
    "clipped by value": partial(
        train_in_one_process, EVERY_STEP, partial(torch.nn.utils.clip_grad_value_, clip_value=VALUE)
    ),
}


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    return on_ranks(fit_each_way, str(tmp_path_factory.mktemp("fit")))


@pytest.mark.parametrize("name", RUNS)
def test_gradients_equal_those_of_one_process(ranks: list[dict[str, Run]], name: str) -> None:
    ours, theirs = ranks[0][name], ONE_PROCESS[name]()
    assert len(ours.clipped) == len(theirs.clipped)
    for ours_clipped, theirs_clipped in zip(ours.clipped, theirs.clipped, strict=True):
        assert norm(theirs_clipped) > 0.01
        assert_same(ours_clipped, theirs_clipped)


@pytest.mark.parametrize("name", RUNS)
def test_weights_equal_those_of_one_process(ranks: list[dict[str, Run]], name: str) -> None:
    assert_same(ranks[0][name].weights, ONE_PROCESS[name]().weights)


@pytest.mark.parametrize("name", RUNS)
def test_gradients_agree_across_replicas(ranks: list[dict[str, Run]], name: str) -> None:
    for rank in ranks[1:]:
        for mine, first in zip(rank[name].gradients, ranks[0][name].gradients, strict=True):
            assert all(torch.equal(mine[key], first[key]) for key in first)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_with_different_seeds_train_one_model(ranks: list[dict[str, Run]], name: str) -> None:
    for rank in ranks[1:]:
        assert all(torch.equal(rank[name].weights[key], weight) for key, weight in ranks[0][name].weights.items())


def test_gradients_are_reduced_over_replicas_at_the_boundary_only(ranks: list[dict[str, Run]]) -> None:
    assert ranks[0]["every step"].all_reduces == [UNITS] * 5
    assert ranks[0]["accumulated"].all_reduces == [0, UNITS, 0, UNITS, UNITS]


def test_the_shorter_window_at_the_end_of_an_epoch_is_stepped(ranks: list[dict[str, Run]]) -> None:
    gradients = ranks[0]["accumulated"].gradients
    assert len(gradients) == 3
    assert norm(gradients[2]) == pytest.approx(norm(ONE_PROCESS["accumulated"]().gradients[2]), rel=1e-5)


def test_clipping_by_norm_clips_the_norm_over_all_shards(ranks: list[dict[str, Run]]) -> None:
    run = ranks[0]["clipped by norm"]
    assert all(norm(gradients) > 1.5 * NORM for gradients in run.gradients)
    assert [norm(gradients) for gradients in run.clipped] == pytest.approx([NORM] * 5, rel=1e-4)


def test_clipping_by_value_clips_each_value(ranks: list[dict[str, Run]]) -> None:
    run = ranks[0]["clipped by value"]
    largest = [max(float(g.abs().max()) for g in gradients.values()) for gradients in run.gradients]
    assert min(largest) > 1.5 * VALUE
    assert all(float(g.abs().max()) <= VALUE for gradients in run.clipped for g in gradients.values())
