"""``Fabric(strategy="mics")``: setting up models, optimizers and data."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mics import MiCSFabricStrategy
from tests.support.loops import (
    alone,
    assert_same,
    network,
    set_up_in_one_call,
    set_up_in_two_calls,
    sgd,
    start,
    step,
    weights,
)
from tests.support.models import OneBlock
from tests.support.recorded import RecordCollectives
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By case, what each of four ranks has returned; all cases run in one set of processes."""
    folder = tmp_path_factory.mktemp("set up")
    return cases_on_ranks(
        {
            **{set_up: partial(train_after, set_up, folder) for set_up in WAYS},
            "scheduler and groups": set_up_a_scheduler_and_groups,
            "by name": by_name,
            "compiled": compiled,
            **{("parts", move): partial(parts_of_ranks, move) for move in (True, False)},
        }
    )


def set_up_on_meta(fabric: Fabric) -> Any:
    with fabric.init_module(empty_init=True):
        model = OneBlock()
    assert all(parameter.is_meta for parameter in model.parameters())
    model, optimizer = fabric.setup(model, sgd(model))
    fabric.load_raw(Path("raw.pt"), model)
    return model, optimizer


def train_after(set_up: Callable[[Fabric], Any], folder: Path) -> dict[str, Tensor]:
    os.chdir(folder)
    fabric = start()
    if fabric.global_rank == 0:
        torch.save(network().state_dict(), "raw.pt")
    fabric.barrier()
    model, optimizer = set_up(fabric)
    for index in range(2):
        step(fabric, model, optimizer, seed=index)
    return weights(model)


WAYS = [set_up_in_one_call, set_up_in_two_calls, set_up_on_meta]


@pytest.mark.parametrize("set_up", WAYS)
def test_however_it_is_set_up_it_trains_as_one_process(set_up: Callable[[Fabric], Any], seen: Seen) -> None:
    for trained in seen[set_up]:
        assert_same(trained, alone(steps=2), 1e-6)


def set_up_a_scheduler_and_groups() -> list[float]:
    fabric = start()
    model = network()
    groups = [{"params": model.blocks.parameters(), "lr": 0.5}, {"params": model.norm.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
    before = weights(model)
    step(fabric, model, optimizer)
    scheduler.step()
    changed = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert changed == {name for name, _ in network().named_parameters() if name.split(".")[0] in ("blocks", "norm")}
    return [group["lr"] for group in optimizer.param_groups]


def test_groups_and_schedulers_of_an_optimizer_stay(seen: Seen) -> None:
    assert seen["scheduler and groups"] == [[0.25, 0.05]] * 4


def by_name() -> tuple[str, int, dict[str, int]]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy="mics")
    fabric.launch()
    data = fabric.setup_dataloaders(DataLoader(list(range(8)), batch_size=1))
    seen = [int(value) for value in data]
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, seen)
    assert sorted(value for of_rank in gathered for value in of_rank) == list(
        range(8)
    )  # every rank has data of its own
    return type(fabric.strategy).__name__, len(seen), fabric.strategy.distributed_sampler_kwargs


def test_the_name_is_registered_and_each_rank_has_its_own_data(seen: Seen) -> None:
    for rank, said in enumerate(seen["by name"]):
        assert said == ("MiCSFabricStrategy", 2, {"num_replicas": 4, "rank": rank})


def compiled() -> dict[str, Tensor]:
    fabric = start()
    model = torch.compile(network(), backend="aot_eager")
    model, optimizer = fabric.setup(model, sgd(model))
    step(fabric, model, optimizer)
    return weights(getattr(model, "_orig_mod", model))


def test_a_compiled_model_is_compiled_again(seen: Seen) -> None:
    for trained in seen["compiled"]:
        assert_same({name.removeprefix("_orig_mod."): value for name, value in trained.items()}, alone(), 1e-6)


def parts_of_ranks(move: bool) -> tuple[float, str, list[Any]]:
    fabric = start(activation_checkpointing=True)
    model = network()
    with RecordCollectives() as recorded:
        model, optimizer = fabric.setup(model, sgd(model), move_to_device=move)
    step(fabric, model, optimizer)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    gathers = [one for one in recorded.of("all_gather") if one.dtype.is_floating_point]
    return held / sum(p.numel() for p in model.parameters()), str(model.device), gathers


@pytest.mark.parametrize("move", [True, False])
def test_each_rank_holds_its_shards_and_setup_gathers_nothing(move: bool, seen: Seen) -> None:
    for share, device, gathers in seen["parts", move]:
        assert share == pytest.approx(0.5, abs=0.06)  # rows of awkward shapes are uneven
        assert device == "cpu" and gathers == []


def too_early_and_too_much() -> list[str]:
    strategy = MiCSFabricStrategy()
    said = []
    for ask in (
        lambda: strategy.device_mesh,
        lambda: strategy.checkpoint_io,
        lambda: setattr(strategy, "checkpoint_io", None),
        lambda: strategy.save_checkpoint("c", {}, storage_options={}),
    ):
        try:
            ask()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            said.append(type(error).__name__)
    return said


def test_calls_before_launch_and_options_of_other_strategies_are_rejected() -> None:
    assert too_early_and_too_much() == ["RuntimeError", "NotImplementedError", "NotImplementedError", "TypeError"]
