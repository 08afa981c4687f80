"""``Fabric(strategy="mics")``: checkpoints, of the Trainer and of Fabric on one device too."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_mics.checkpoint.errors import UnsafeCheckpointError
from tests.support.loops import (
    adam,
    assert_same,
    network,
    set_up_in_one_call,
    set_up_in_two_calls,
    sgd,
    start,
    step,
    weights,
)
from tests.support.models import OneBlock, TinyLM, TinyModule, tokens
from tests.support.trainers import cases_on_ranks, loader, make_trainer, mics

Seen = dict[Any, list[Any]]


class Counter:
    """Has a state."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def save(path: Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = start(**options)
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 1, "counter": Counter(7), "nested": {"lr": [0.1]}}
    fabric.save(path, state)
    fabric.strategy.wait_for_checkpoints()
    saved = weights(model)
    step(fabric, model, optimizer, seed=1)
    return saved, weights(model)


def load(path: Path, devices: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = start(devices=devices, **options)
    model = network(seed=5)
    model, optimizer = fabric.setup(model, adam(model))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "counter": Counter(0)}
    remainder = fabric.load(path, state)
    assert state["step"] == 1 and state["counter"].count == 7
    assert remainder == {"nested": {"lr": [0.1]}}  # and nothing of our own
    loaded = weights(model)
    if devices == 4:
        step(fabric, model, optimizer, seed=1)
    return loaded, weights(model)


RESUMED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {  # options of the save, ranks and options of the load
    "alike": ({}, 4, {}),
    "on larger groups": ({}, 4, {"partition_size": 4}),
    "on fewer ranks": ({"partition_size": 4}, 2, {}),
    "from a full file": ({"state_dict_type": "full"}, 4, {"partition_size": 1}),
    "saved asynchronously": ({"async_save": True}, 4, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fabric")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Seen:
    """By case, what each of four ranks has returned that saves; all cases run in one set of processes."""
    return cases_on_ranks(
        {
            **{name: partial(save, folder / name, options) for name, (options, *_) in RESUMED.items()},
            "lacking": partial(load_what_is_not_there, folder / "lacking"),
            "filtered": partial(save_filtered, folder / "filtered.pt"),
            "full file": partial(save_a_full_file, folder / "four.pt"),
            "store": partial(save_and_load_in_a_store, folder),
            **{("trainer", kind): partial(fit, folder, kind) for kind in ("sharded", "full")},
            **{("window", kind): partial(load_in_a_window, folder / kind, OF_WINDOWS[kind]) for kind in OF_WINDOWS},
            "for the trainer": partial(save_for_the_trainer, folder / "fabric.ckpt"),
        }
    )


@pytest.fixture(scope="module")
def on_one(folder: Path, saved: Seen) -> OnOne:
    return OnOne(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path, saved: Seen, on_one: OnOne) -> Seen:
    """By case, what each rank has returned that loads; one set of processes for as many ranks."""
    write_raw_files(folder)
    resumed = {
        ranks: {
            name: partial(load, folder / name, ranks, options)
            for name, (_, devices, options) in RESUMED.items()
            if devices == ranks
        }
        for ranks in (2, 4)
    }
    on_four = {
        **resumed[4],
        "full file": partial(load_a_full_file, folder / "one.pt"),
        "raw": partial(load_raw_files, folder),
        **{
            ("trainer", kind): partial(load_the_trainers, folder / f"trainer {kind}.ckpt")
            for kind in ("sharded", "full")
        },
        "of fabric": partial(fit_from, folder),
    }
    return {**cases_on_ranks(resumed[2], world_size=2), **cases_on_ranks(on_four)}


@pytest.mark.parametrize("name", RESUMED)
def test_training_resumes_from_a_checkpoint(name: str, saved: Seen, loaded: Seen) -> None:
    weights_saved, went_on = saved[name][0]
    for weights_loaded, then in loaded[name]:
        assert_same(weights_loaded, weights_saved)
        if RESUMED[name][1] == 4:
            assert_same(then, went_on, 1e-6)


OF_WINDOWS: dict[str, dict[str, Any]] = {
    "never": {"cache_parameters": "never", "accumulate_gradients": "shard"},
    "node": {},
    "rank": {"cache_parameters": "rank", "accumulate_gradients": "rank"},
}


def load_in_a_window(path: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    fabric = start(**options)
    model, optimizer = set_up_in_one_call(fabric)
    state = {"model": model, "optimizer": optimizer}
    fabric.save(path, state)
    with fabric.no_backward_sync(model):
        fabric.backward(model(tokens(2, seed=fabric.global_rank)))
    fabric.load(path, state)
    fabric.backward(model(tokens(2, seed=10 + fabric.global_rank)))
    fabric.load(path, state)
    optimizer.step()
    optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("kind", OF_WINDOWS)
def test_loading_between_backward_and_step_keeps_the_gradients(kind: str, saved: Seen) -> None:
    model = network()
    optimizer = sgd(model)
    (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4) for index in range(2)) / 4).backward()
    optimizer.step()
    for of_rank in saved["window", kind]:
        assert_same(of_rank, model.state_dict(), 1e-6)


def load_what_is_not_there(path: Path) -> tuple[str, Any]:
    fabric = start()
    model, _ = set_up_in_two_calls(fabric)
    fabric.save(path, {"model": model})
    state = {"model": model, "epoch": 3}
    with pytest.raises(KeyError) as error:
        fabric.load(path, state)
    fabric.load(path, state, strict=False)
    other = fabric.setup_module(network(kind=TinyLM))
    with pytest.raises(RuntimeError, match="the checkpoint and the model differ"):
        fabric.load(path, {"model": other})
    return str(error.value), state["epoch"]


def test_what_a_checkpoint_lacks_is_named_unless_that_is_allowed(saved: Seen) -> None:
    for message, epoch in saved["lacking"]:
        assert re.search(r"has no \\?'epoch\\?': .*; load with strict=False", message)
        assert epoch == 3


def save_filtered(path: Path) -> None:
    fabric = start(state_dict_type="full")
    model, _ = set_up_in_one_call(fabric)
    fabric.save(path, {"model": model, "epoch": 2}, filter={"model": lambda name, _: "bias" not in name})


def test_a_full_file_can_be_filtered(folder: Path, saved: Seen) -> None:
    content = torch.load(folder / "filtered.pt", weights_only=True)
    assert content["epoch"] == 2
    assert content["model"].keys() == {name for name in network().state_dict() if "bias" not in name}


class OnOne:
    """Takes the full file of four ranks to one device, trains a step there, and saves a full file for them.

    Attributes:
        found: The weights in the file.
        trained: The weights after the step.
        moments: The sum of the first parameter's first moments then, without their signs.
    """

    def __init__(self, folder: Path) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        model = network()
        model, optimizer = fabric.setup(model, adam(model))
        state = {"net": model, "adam": optimizer, "step": 0}
        fabric.load(folder / "four.pt", state)
        self.found = weights(model)
        step(fabric, model, optimizer)
        fabric.save(folder / "one.pt", {**state, "step": 2})
        self.trained = weights(model)
        self.moments = float(optimizer.state_dict()["state"][0]["exp_avg"].abs().sum())


def save_a_full_file(path: Path) -> dict[str, Tensor]:
    fabric = start(state_dict_type="full")
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    fabric.save(path, {"net": model, "adam": optimizer, "step": 1})
    return weights(model)


def load_a_full_file(path: Path) -> tuple[dict[str, Tensor], int, float]:
    fabric = start()
    model = network(seed=5)
    model, optimizer = fabric.setup(model, adam(model))
    state = {"net": model, "adam": optimizer, "step": 0}
    assert fabric.load(path, state) == {}
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    return weights(model), state["step"], float(moments.full_tensor().abs().sum())


def test_full_files_load_in_fabric_on_one_device_and_back(saved: Seen, on_one: OnOne, loaded: Seen) -> None:
    assert_same(on_one.found, saved["full file"][0])
    for weights_loaded, steps, moments in loaded["full file"]:
        assert_same(weights_loaded, on_one.trained)
        assert steps == 2 and moments == pytest.approx(on_one.moments)


def save_and_load_in_a_store(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    fabric = start()
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    saved, url = weights(model), f"local://{folder}/sharded"
    fabric.save(url, {"model": model, "optimizer": optimizer, "kind": re.compile("a")})
    step(fabric, model, optimizer, seed=1)
    with pytest.raises(UnsafeCheckpointError):
        fabric.load(url, {"model": model, "optimizer": optimizer})
    remainder = fabric.load(url, {"model": model, "optimizer": optimizer}, weights_only=False)
    assert remainder == {"kind": re.compile("a")}
    loaded = weights(model)
    trusting = start(weights_only=False)
    other = network()
    other, other_optimizer = trusting.setup(other, adam(other))
    assert trusting.load(url, {"model": other, "optimizer": other_optimizer}) == remainder
    with pytest.raises(UnsafeCheckpointError):
        trusting.load(url, {"model": other, "optimizer": other_optimizer}, weights_only=True)
    if fabric.global_rank == 0:
        torch.save(network(seed=7).state_dict(), folder / "store.pt")
    fabric.barrier()
    fabric.load_raw(f"local://{folder}/store.pt", model)
    return saved, loaded, weights(model)


def test_checkpoints_in_a_store_and_objects_that_must_be_trusted(saved: Seen) -> None:
    for before, loaded, raw in saved["store"]:
        assert_same(loaded, before)
        assert_same(raw, dict(network(seed=7).state_dict()))


def write_raw_files(folder: Path) -> None:
    whole = network().state_dict()
    torch.save(whole, folder / "whole.pt")
    torch.save({name: value for name, value in whole.items() if name != "norm.bias"}, folder / "lacking.pt")
    torch.save([1, 2], folder / "list.pt")


def load_raw_files(folder: Path) -> list[str]:
    fabric = start()
    model, _ = set_up_in_one_call(fabric)
    said = []
    for name in ("lacking.pt", "list.pt", "not there.pt"):
        try:
            fabric.load_raw(folder / name, model)
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    fabric.load_raw(folder / "lacking.pt", model, strict=False)
    plain = network(seed=5)
    fabric.load_raw(folder / "whole.pt", plain)  # a module that was not set up
    assert_same(weights(plain), dict(network().state_dict()))
    return said


def test_raw_files_that_do_not_fit_are_rejected(loaded: Seen) -> None:
    for lacking, no_dictionary, not_there in loaded["raw"]:
        assert 'Missing key(s) in state_dict: "norm.bias"' in lacking
        assert "holds list, no state_dict" in no_dictionary
        assert "is neither a file with a state_dict nor a sharded checkpoint" in not_there


# -- the Trainer's checkpoints, and the other way round ----------------------------------------------------------------


def fit(folder: Path, kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trainer = make_trainer(folder, strategy=mics(partition_size=4, state_dict_type=kind), max_steps=2)
    model = TinyModule(kind=OneBlock)
    trainer.fit(model, loader())
    trainer.save_checkpoint(folder / f"trainer {kind}.ckpt")
    return weights(model)


def load_the_trainers(path: Path) -> tuple[dict[str, Tensor], int]:
    fabric = start()
    model = TinyModule(kind=OneBlock)
    model, optimizer = fabric.setup(model, sgd(model))
    remainder = fabric.load(path, {"model": model, "optimizer": optimizer})
    raw = fabric.setup_module(TinyModule(kind=OneBlock))
    if path.is_dir():
        fabric.load_raw(path, raw)
        assert_same(weights(raw), weights(model))
    return weights(model), remainder["global_step"]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fabric_loads_the_trainers_checkpoint(kind: str, saved: Seen, loaded: Seen) -> None:
    for weights_loaded, steps in loaded["trainer", kind]:
        assert_same(weights_loaded, saved["trainer", kind][0])
        assert steps == 2


def save_for_the_trainer(path: Path) -> dict[str, Tensor]:
    fabric = start()
    model = TinyModule(kind=OneBlock)
    model, optimizer = fabric.setup(model, sgd(model))
    loss = model(tokens(2))
    fabric.backward(loss)
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return weights(model)


class AsLoaded(TinyModule):
    """Records the weights at the start of training."""

    def on_train_start(self) -> None:
        self.first = weights(self)


def fit_from(folder: Path) -> tuple[dict[str, Tensor], int]:
    trainer = make_trainer(folder, strategy=mics(partition_size=4), max_steps=2)
    model = AsLoaded(kind=OneBlock)
    trainer.fit(model, loader(), ckpt_path=folder / "fabric.ckpt")
    return model.first, trainer.global_step


def test_the_trainer_starts_from_fabrics_checkpoint(saved: Seen, loaded: Seen) -> None:
    for first, steps in loaded["of fabric"]:
        assert_same(first, saved["for the trainer"][0])
        assert steps == 2
