"""Ranks that take different ways end in one error on all of them, in time; and programs that may differ still run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics import CommunicationOptions, RanksDifferError, Topology, create_partition_groups, shard_model
from lightning_mics.collectives import control_plane, watcher
from tests.support.campaign import campaign
from tests.support.models import DIM, Stack, TinyModule, tokens
from tests.support.trainers import cases_on_ranks, loader, make_trainer, mics

LIMIT = 10.0  # seconds

# -- loops of one's own ------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two equal layers in each block, so that their gradients have one size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(DIM, DIM, bias=False)
        self.two = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, which: str = "both") -> Tensor:
        if which == "both":
            return self.two(torch.tanh(self.one(x)))
        return self.one(x) if which == "one" else self.two(x)


class Ordered(nn.Module):
    """Equal blocks, called as a rank says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Twins() for _ in range(3))

    def forward(self, x: Tensor, order: Any = (0, 1, 2), which: str = "both") -> Tensor:
        x = self.first(x)
        for index in order:
            x = self.layers[index](x, which)
        return x.square().mean()


def _steps(
    way: Callable[..., None], *, size: int = 2, cache: str = "never", differs_at: int = 1, ahead: int = 0
) -> Any:
    """Weights after three steps or more, or the error and the seconds it took."""
    torch.manual_seed(0)
    model, rank = Ordered(), dist.get_rank()
    groups = create_partition_groups(Topology(world_size=4, ranks_per_node=2, partition_size=size), device_type="cpu")
    gradients: Any = "rank" if cache == "rank" else "shard"
    options = CommunicationOptions(cache_parameters=cache, accumulate_gradients=gradients, inter_node_prefetch=ahead)
    schedule = shard_model(model, groups, communication=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def micro_step(*, boundary: bool = True, **options: Any) -> None:
        with schedule.micro_step(boundary=boundary):
            model(torch.ones(2, DIM) * (rank + 1), **options).backward()

    began = time.monotonic()
    try:
        for step in range(max(3, differs_at + 1)):
            began = time.monotonic()
            way(model, micro_step, rank if step >= differs_at else 0)
            optimizer.step()
            optimizer.zero_grad()
    except RanksDifferError as error:
        return str(error), time.monotonic() - began
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def _other_order(model: Any, micro_step: Any, rank: int) -> None:
    micro_step(order=(1, 2, 0) if rank == 1 else (0, 1, 2))


def _one_left_out(model: Any, micro_step: Any, rank: int) -> None:
    micro_step(order=(0, 2) if rank == 1 else (0, 1, 2))


def _other_parameters_of_a_block(model: Any, micro_step: Any, rank: int) -> None:
    micro_step(which="two" if rank == 1 else "one")


def _forward_on_one_rank(model: Any, micro_step: Any, rank: int) -> None:
    micro_step()
    if rank == 1:
        model(torch.ones(1, DIM))


def _backward_more_on_one_rank(model: Any, micro_step: Any, rank: int) -> None:
    micro_step()
    if rank == 1:
        micro_step()


def _micro_step_fewer_on_one_rank(model: Any, micro_step: Any, rank: int) -> None:
    if rank != 1:
        micro_step(boundary=False)
    micro_step()


def _boundary_on_one_rank(model: Any, micro_step: Any, rank: int) -> None:
    micro_step(boundary=rank == 1)
    micro_step()


@torch.no_grad()
def _change_of_weights(model: Any, rank: int) -> None:
    if rank == 1:
        model.layers[1].one.weight.to_local().mul_(1.1)


def _weights_changed_on_one_rank(model: Any, micro_step: Any, rank: int) -> None:
    micro_step(boundary=False)
    _change_of_weights(model, rank)
    micro_step()


DIFFERENT: dict[str, tuple[Callable[..., Any], str]] = {
    "another order": (partial(_steps, _other_order), "'layers.1'"),
    "other parameters of a block": (partial(_steps, _other_parameters_of_a_block), "parameters 1"),
    "a forward more": (partial(_steps, _forward_on_one_rank), "'the root'"),
    "a backward more, replicated": (partial(_steps, _backward_more_on_one_rank, size=1), "steps SGD"),
    "a micro-step fewer": (partial(_steps, _micro_step_fewer_on_one_rank), "'layers.2'"),
    "a block left out, fetched ahead": (partial(_steps, _one_left_out, size=4, differs_at=3, ahead=1), "'layers.1'"),
    "another boundary": (partial(_steps, _boundary_on_one_rank), "over the replicas"),
    "weights cached by nodes changed": (
        partial(_steps, _weights_changed_on_one_rank, size=4, cache="node"),
        "rank 1 gathers 'layers.1' for a forward inside the node, with what is not cached (",
    ),
}
IN_CAMPAIGN: dict[str, tuple[Callable[..., Any], str]] = {
    "a block left out": (partial(_steps, _one_left_out), "'layers.1'"),
    "another order, replicated": (partial(_steps, _other_order, size=1), "'layers.2'"),
    "another order from the start": (partial(_steps, _other_order, differs_at=0), "'layers.1'"),
    "another order, fetched ahead": (partial(_steps, _other_order, size=4, differs_at=3, ahead=1), "'layers.1'"),
    "weights cached by ranks changed": (
        partial(_steps, _weights_changed_on_one_rank, cache="rank"),
        "rank 1 gathers 'layers.1' for a forward",
    ),
    "another order, over all ranks": (partial(_steps, _other_order, size=4), "'layers.1'"),
    "another order, cached": (partial(_steps, _other_order, cache="rank"), "'layers.1'"),
    "a block left out, replicated": (partial(_steps, _one_left_out, size=1), "'layers.1'"),
    "a backward more": (partial(_steps, _backward_more_on_one_rank), "'the root'"),
}


def _same_layer_drop(model: Any, micro_step: Any, rank: int) -> None:
    draw = torch.rand(3, generator=torch.Generator().manual_seed(int(model.first.weight.shape[0])))
    micro_step(order=[layer for layer in range(3) if draw[layer] > 0.3])


def _other_lengths_per_partition_group(model: Any, micro_step: Any, rank: int) -> None:
    with torch.no_grad():
        for _ in range(1 + rank // 2):  # as in an evaluation of other lengths
            model(torch.ones(2, DIM))
    model.reshard()
    micro_step()


def _frozen_and_twice(model: Any, micro_step: Any, rank: int) -> None:
    model.layers[1].requires_grad_(False)
    micro_step(boundary=False)
    micro_step(order=(0, 1, 0, 2))


def _late(model: Any, micro_step: Any, rank: int) -> None:
    time.sleep(0.4 if rank == 1 else 0)  # longer than the patience of this test
    micro_step()


ALIKE: dict[str, Callable[..., Any]] = {
    "the same layer drop": partial(_steps, _same_layer_drop),
    "other lengths per partition group": partial(_steps, _other_lengths_per_partition_group),
    "frozen blocks, blocks called twice": partial(_steps, _frozen_and_twice),
    "a rank that is late": partial(_steps, _late),
}


# -- the Trainer -------------------------------------------------------------------------------------------------------


class Batches(IterableDataset[Tensor]):
    """Four batches, on rank 1 perhaps three."""

    def __init__(self, *, fewer: bool) -> None:
        self.fewer = fewer

    def __iter__(self) -> Any:
        return iter(tokens(3 if self.fewer and dist.get_rank() == 1 else 4))


class Wayward(TinyModule):
    """A module whose rank 1 does something else in its third batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.kind == "an exception on all ranks":
            raise ValueError("a mistake of all")
        if batch_idx == 2 and self.global_rank == 1:
            if self.kind == "an exception":
                raise ValueError("my own mistake")
            self.trainer.should_stop = self.kind == "should_stop"
        return self.net(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.kind == "a forward on rank 0" and self.global_rank == 0 and self.global_step == 2:
            self(tokens(1))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for _ in range(2 if self.kind == "forwards of predict" and self.global_rank == 1 else 1):
            loss = self(batch)
        return loss


def _fit(kind: str, folder: Path) -> Any:
    saving = ModelCheckpoint(folder / kind, save_on_exception=True, every_n_train_steps=99, filename="saved")
    trainer = make_trainer(
        folder, strategy=mics(partition_size=2), callbacks=[saving], enable_checkpointing=True, min_epochs=0
    )
    module = Wayward(kind)
    batches: Any = DataLoader(Batches(fewer=kind == "a batch fewer"), batch_size=1)
    began = time.monotonic()
    try:
        if kind == "forwards of predict":
            trainer.strategy._policy.communication = CommunicationOptions()
            trainer.predict(module, loader(8))
        else:
            trainer.fit(module, batches)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing was raised", "", 0.0


FITS = ("should_stop", "a batch fewer", "a forward on rank 0", "an exception", "forwards of predict")


# -- ranks, each case in a job of its own ------------------------------------------------------------------------------


def _in_new_job(function: Callable[[], Any], store: Path) -> Any:
    """Run in a new default process group: after an error the old one is of no use. The watchers are quick here."""
    watcher.PATIENCE, watcher.TICK = 0.2, 0.05
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return function()


def _different(in_campaign: bool) -> dict[str, tuple[Callable[..., Any], str]]:
    return DIFFERENT | IN_CAMPAIGN if in_campaign else DIFFERENT


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> Any:
    folder = tmp_path_factory.mktemp("jobs")
    cases: dict[str, Callable[[], Any]] = {name: case for name, (case, _) in _different(in_campaign).items()} | ALIKE
    cases |= {name: partial(_fit, name, folder) for name in (*FITS, "an exception on all ranks")}
    stores = {name: folder / f"store {number}" for number, name in enumerate(cases)}
    jobs = {name: partial(_in_new_job, case, stores[name]) for name, case in cases.items()}
    return cases_on_ranks(jobs), folder


@pytest.mark.parametrize("name", [*DIFFERENT, *map(campaign, IN_CAMPAIGN)])
def test_a_rank_that_takes_another_way_is_one_error_of_all_ranks(name, results):
    first = results[0][name][0]
    for of_rank in results[0][name]:
        assert isinstance(of_rank, tuple), "no error was raised"
        message, seconds = of_rank
        assert message == first[0]
        assert "rank 1 " in message
        assert "(micro-step " in message
        assert _different(True)[name][1] in message
        assert seconds < LIMIT


@pytest.mark.parametrize("name", ALIKE)
def test_ranks_that_may_differ_still_train(name, results):
    start = [p.detach() for p in _whole_start()]
    for of_rank in results[0][name]:
        assert isinstance(of_rank, list), of_rank
        for ours, other in zip(of_rank, results[0][name][0], strict=True):
            assert torch.equal(ours, other)
        assert any(not torch.equal(ours, before) for ours, before in zip(of_rank, start, strict=True))


def _whole_start() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return list(Ordered().parameters())


@pytest.mark.parametrize("name", FITS)
def test_the_trainer_ends_on_all_ranks(name, results):
    kinds = [kind for kind, _, _ in results[0][name]]
    own = "ValueError" if name == "an exception" else "RanksDifferError"
    assert kinds == ["RanksDifferError", own, "RanksDifferError", "RanksDifferError"]
    assert all(seconds < LIMIT for _, _, seconds in results[0][name])
    words = {message for kind, message, _ in results[0][name] if kind == "RanksDifferError"}
    assert len(words) == 1


def test_an_exception_shows_as_itself_and_by_name_on_the_others(results):
    of_ranks = results[0]["an exception"]
    assert of_ranks[1][1] == "my own mistake"
    for rank in (0, 2, 3):
        assert "rank 1 raises ValueError: my own mistake" in of_ranks[rank][1]


def test_an_exception_of_all_ranks_still_saves(results):
    of_ranks, folder = results
    assert [kind for kind, _, _ in of_ranks["an exception on all ranks"]] == ["ValueError"] * 4
    assert list((folder / "an exception on all ranks").iterdir())


def test_a_steady_training_never_waits_to_agree(run_shared):
    for meetings in run_shared(4, _count_meetings):
        assert meetings[0] > 0
        assert meetings[2:] == [0, 0]


def _count_meetings() -> list[int]:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=2)
    groups = create_partition_groups(topology, device_type="cpu")
    model = Stack()
    schedule = shard_model(model, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    count, meet = [0], control_plane.Stream._meet

    def counted(stream: Any, entry: str) -> None:
        count[0] += 1
        meet(stream, entry)

    control_plane.Stream._meet = counted
    of_steps = []
    for _ in range(4):
        count[0] = 0
        for boundary in (False, False, True):
            with schedule.micro_step(boundary=boundary):
                model(torch.randn(2, DIM)).backward()
        optimizer.step()
        of_steps.append(count[0])
    control_plane.Stream._meet = meet
    return of_steps
