"""Manual optimization: several optimizers, steps and accumulation windows of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mics import CommunicationOptions
from tests.support.campaign import campaign
from tests.support.models import OneBlock, TinyLM, TinyModule, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import cases_on_ranks, make_trainer, mics, on_ranks

LR = 0.5


RANKS = 4


UNITS = 2  # a block and the root


SAMPLES = tokens(32, seed=6)  # two per rank and micro-step: four micro-steps


def split_along_groups(model: TinyLM) -> list[list[nn.Parameter]]:
    """The parameters of blocks, and those of the root."""
    blocks = list(model.blocks.parameters())
    return [blocks, [p for p in model.parameters() if all(p is not block for block in blocks)]]


def split_within_groups(model: TinyLM) -> list[list[nn.Parameter]]:
    """Weights and biases: each block has parameters of both optimizers."""
    return [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]


class Loop:
    """A training loop by hand, the same for the Trainer and for one process."""

    split = staticmethod(split_along_groups)
    strategy: ClassVar[dict[str, Any]] = {}

    def optimizers_of(self, model: TinyLM) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(parameters, lr=LR) for parameters in self.split(model)]

    def micro_step(self, step: int, optimizers: list[Any], backward: Any, toggle: Any) -> None:
        raise NotImplementedError


class DifferentFrequencies(Loop):
    """The first optimizer steps every time, the second every second time, and each gradient counts until its step."""

    def micro_step(self, step: int, optimizers: list[Any], backward: Any, toggle: Any) -> None:
        backward(1.0)
        for optimizer, every in zip(optimizers, (1, 2), strict=True):
            if step % every == 0:
                optimizer.step()
                optimizer.zero_grad()


class Accumulating(Loop):
    """One optimizer; windows of two micro-steps."""

    def optimizers_of(self, model: TinyLM) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=LR)]

    def micro_step(self, step: int, optimizers: list[Any], backward: Any, toggle: Any) -> None:
        (optimizer,) = optimizers
        boundary = step % 2 == 0
        with toggle(optimizer, sync_grad=boundary):
            backward(0.5)
        if boundary:
            optimizer.step()
            optimizer.zero_grad()


class Alternating(Loop):
    """Each optimizer has backwards of its own, as with a generator and a discriminator."""

    def micro_step(self, step: int, optimizers: list[Any], backward: Any, toggle: Any) -> None:
        for optimizer in optimizers:
            with toggle(optimizer):
                backward(1.0)
                optimizer.step()
            optimizer.zero_grad()


class AlternatingAndAccumulating(Loop):
    """As before, and the second optimizer has windows of two micro-steps, between which the first one steps."""

    def micro_step(self, step: int, optimizers: list[Any], backward: Any, toggle: Any) -> None:
        for optimizer, every in zip(optimizers, (1, 2), strict=True):
            boundary = step % every == 0
            with toggle(optimizer, sync_grad=boundary):
                backward(1 / every)
            if boundary:
                optimizer.step()
                optimizer.zero_grad()


class AlternatingInsideUnits(Alternating):
    split = staticmethod(split_within_groups)


class AlternatingInOneUnit(Alternating):
    strategy: ClassVar[dict[str, Any]] = {"block_classes": []}


class AlternatingAndAccumulatingInsideUnits(AlternatingAndAccumulating):
    split = staticmethod(split_within_groups)


LOOPS = [
    DifferentFrequencies,
    Accumulating,
    Alternating,
    AlternatingAndAccumulating,
    AlternatingInsideUnits,
    AlternatingInOneUnit,
    AlternatingAndAccumulatingInsideUnits,
]


COUNTED = (Accumulating, Alternating)  # loops whose collectives are recorded


class ByHand(TinyModule):
    def __init__(self, loop: Loop) -> None:
        super().__init__(kind=OneBlock)
        self.automatic_optimization = False
        self.loop, self.collectives, self.all_reduces = loop, RecordCollectives(), []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.loop.optimizers_of(self.net)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.collectives.seen.clear()
        optimizers = self.optimizers()
        self.loop.micro_step(
            batch_idx + 1,
            optimizers if isinstance(optimizers, list) else [optimizers],
            lambda share: self.backward_and_look(batch, share),
            lambda optimizer, **options: optimizer.toggle_model(**options),
        )
        replicas = self.trainer.strategy.topology.replication_group(self.global_rank)
        self.all_reduces.append(len(self.collectives.of("all_reduce", replicas)))

    def backward_and_look(self, batch: Tensor, share: float) -> None:
        self.manual_backward(self.net(batch) * share)
        with torch.no_grad():
            self.net(batch)  # gathers the weights that the optimizer is about to change


def fit_each_loop(folder: str, groups: str, loops: list[type[Loop]]) -> dict[str, Any]:
    partition_size, communication = GROUPS[groups]
    results: dict[str, Any] = {}
    for loop in loops:
        torch.manual_seed(0)
        module = ByHand(loop())
        strategy = mics(partition_size=partition_size, **communication.keywords(), **loop.strategy)
        trainer = make_trainer(folder, strategy=strategy, use_distributed_sampler=False)
        with module.collectives if loop in COUNTED else nullcontext():
            trainer.fit(module, DataLoader(SAMPLES[dist.get_rank() :: RANKS], batch_size=2))
        weights = {name: p.full_tensor() for name, p in module.net.named_parameters()}
        results[loop.__name__] = (weights, module.all_reduces)
    return results


@contextmanager
def only(parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Let only these parameters get gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in parameters))
    yield
    model.requires_grad_(True)


def train_in_one_process(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = OneBlock()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = loop.optimizers_of(model)

    def toggle(optimizer: torch.optim.Optimizer, sync_grad: bool = True) -> AbstractContextManager[None]:
        return only(optimizer.param_groups[0]["params"], model)

    for step in range(4):
        batch = SAMPLES[8 * step : 8 * step + 8]
        loop.micro_step(step + 1, optimizers, lambda share, batch=batch: (model(batch) * share).backward(), toggle)
    return dict(model.named_parameters()), first


GROUPS = {
    "ranks": (2, CommunicationOptions.PAPER),  # nothing is cached or accumulated beyond FSDP2
    "ranks that keep": (2, CommunicationOptions.RANK),
    "nodes that keep": (4, CommunicationOptions.NODE),  # both are sent between nodes once per step
}


IN_CAMPAIGN = [  # beside each of these loops in the other groups, and the other loops in these
    ("ranks", DifferentFrequencies),
    ("ranks", AlternatingInOneUnit),
    ("ranks that keep", Alternating),
    ("ranks that keep", AlternatingInsideUnits),
    ("nodes that keep", Accumulating),
    ("nodes that keep", AlternatingInOneUnit),
]


CASES = [(groups, loop) for groups in GROUPS for loop in LOOPS if (groups, loop) not in IN_CAMPAIGN]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> dict[str, dict[str, Any]]:
    """By groups and loop, what rank 0 has returned; all cases run in one set of processes."""
    folder, cases = str(tmp_path_factory.mktemp("fit")), CASES + IN_CAMPAIGN if in_campaign else CASES
    loops = {groups: [loop for of, loop in cases if of == groups] for groups in GROUPS}
    of_ranks = cases_on_ranks({groups: partial(fit_each_loop, folder, groups, loops[groups]) for groups in GROUPS})
    return {groups: found[0] for groups, found in of_ranks.items()}


@pytest.mark.parametrize(("groups", "loop"), [*CASES, *(campaign(*case) for case in IN_CAMPAIGN)])
def test_weights_equal_those_of_the_same_loop_in_one_process(
    trained: dict[str, dict[str, Any]], groups: str, loop: type[Loop]
) -> None:
    theirs, first = train_in_one_process(loop())
    ours, _ = trained[groups][loop.__name__]
    for name, weight in theirs.items():
        assert not torch.equal(weight, first[name])
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_an_optimizer_that_is_not_toggled_gets_no_gradients(trained: dict[str, dict[str, Any]]) -> None:
    _, all_reduces = trained["ranks"]["Alternating"]
    assert all_reduces == [UNITS] * 4  # the block in one backward, the root in the other


@pytest.mark.parametrize("groups", ["ranks", "ranks that keep"])
def test_without_sync_grad_nothing_is_reduced_over_replicas(trained: dict[str, dict[str, Any]], groups: str) -> None:
    _, all_reduces = trained[groups]["Accumulating"]
    assert all_reduces == [0, UNITS, 0, UNITS]


class TogglesInMidWindow(TinyModule):
    """Its window begins with all parameters and continues with those of one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(parameters, lr=LR) for parameters in split_within_groups(self.net)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, _ = self.optimizers()
        with self.trainer.strategy.block_backward_sync():
            self.manual_backward(self.net(batch))
        with first.toggle_model(sync_grad=False):
            self.manual_backward(self.net(batch))


@pytest.mark.parametrize(
    "options",
    [{"partition_size": 1}, {"partition_size": 2, "ranks_per_node": 1, "accumulate_gradients": "node"}],
    ids=str,
)
def test_toggling_inside_a_window_is_rejected(tmp_path: Path, options: dict[str, Any]) -> None:
    def job(folder: str) -> str:
        trainer = make_trainer(folder, strategy=mics(**options), devices=2)
        with pytest.raises(RuntimeError) as caught:
            trainer.fit(TogglesInMidWindow(), DataLoader(SAMPLES, batch_size=2))
        return str(caught.value)

    for message in on_ranks(job, str(tmp_path), world_size=2):
        assert "has parameters that were trainable earlier in this accumulation window and are frozen now" in message
