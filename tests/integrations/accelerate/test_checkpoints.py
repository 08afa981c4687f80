"""``Accelerator(fsdp_plugin=MiCSPlugin())``: checkpoints, and those of the other integrations."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import (
    merge_fsdp_weights,
)
from safetensors.torch import load_file
from torch import Tensor

from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.accelerators import plugin_of, prepared, start, step
from tests.support.loops import adam, alone, assert_same, network, sgd, weights
from tests.support.loops import start as start_fabric
from tests.support.models import OneBlock, TinyModule
from tests.support.trainers import cases_on_ranks, loader, make_trainer, mics, on_ranks

Seen = dict[Any, list[Any]]


def save_state(folder: Path, plugin: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    accelerator = start(plugin=plugin)
    model, optimizer = prepared(accelerator, adam)
    step(accelerator, model, optimizer)
    saved = weights(model)
    accelerator.save_state(str(folder))
    step(accelerator, model, optimizer, seed=1)
    return saved, weights(model)


def load_state(folder: Path, plugin: dict[str, Any], devices: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    accelerator = start(plugin=plugin)
    model, optimizer = prepared(accelerator, adam, seed=5)
    accelerator.load_state(str(folder))
    loaded = weights(model)
    if devices == 4:
        step(accelerator, model, optimizer, seed=1)
    return loaded, weights(model)


RESUMED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {  # options of the save, ranks and options of the load
    "alike": ({}, 4, {}),
    "on larger groups": ({}, 4, {"partition_size": 4}),
    "on fewer ranks": ({"partition_size": 4}, 2, {}),
    "a full file": ({"state_dict_type": "full"}, 4, {"state_dict_type": "full"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Seen:
    """By case, what each of four ranks has returned that saves; all cases run in one set of processes."""
    return cases_on_ranks(
        {
            **{name: partial(save_state, folder / name, options) for name, (options, *_) in RESUMED.items()},
            "merged": partial(save_and_merge, folder),
            "forgotten": forget,
            "state dict": whole_state,
            "ours": partial(save_ours, folder / "accelerate.ckpt"),
        }
    )


@pytest.fixture(scope="module")
def loaded(folder: Path, saved: Seen) -> Seen:
    """By case, what each rank has returned that loads; one set of processes for as many ranks."""
    resumed = {
        ranks: {
            name: partial(load_state, folder / name, options, ranks)
            for name, (_, devices, options) in RESUMED.items()
            if devices == ranks
        }
        for ranks in (2, 4)
    }
    on_four = {**resumed[4], "everywhere": partial(load_everywhere, folder)}
    return {**cases_on_ranks(resumed[2], world_size=2), **cases_on_ranks(on_four)}


@pytest.mark.parametrize("name", RESUMED)
def test_load_state_resumes_from_save_state(name: str, saved: Seen, loaded: Seen) -> None:
    weights_saved, went_on = saved[name][0]
    for weights_loaded, then in loaded[name]:
        assert_same(weights_loaded, weights_saved)
        if RESUMED[name][1] == 4:
            assert_same(then, went_on, 1e-6)


def save_and_merge(folder: Path) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    step(accelerator, model, optimizer)
    accelerator.save_state(str(folder / "state"))
    accelerator.save_model(model, str(folder / "model"))
    merge_fsdp_weights(str(folder / "state" / "pytorch_model_fsdp_0"), str(folder / "merged"))
    return weights(model)


def test_weights_can_be_saved_unsharded_and_merged_from_shards(folder: Path, saved: Seen) -> None:
    trained = saved["merged"][0]
    for name in ("model", "merged"):
        stored = load_file(folder / name / "model.safetensors")
        assert stored.keys() <= trained.keys() and len(stored) >= len(trained) - 1  # tied weights once
        assert_same(stored, {name: trained[name] for name in stored})


def forget() -> tuple[bool, list[str], torch.dtype]:
    accelerator = start()
    model = network().to(torch.bfloat16)
    model, optimizer = accelerator.prepare(model, sgd(model))
    dtype = next(model.parameters()).dtype
    seen: list[str] = []
    handle = accelerator.register_save_state_pre_hook(lambda models, *_: seen.extend(type(m).__name__ for m in models))
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        handle.remove()
        accelerator.save_state(folder)
    known = weakref.ref(model)
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    return known() is None, seen, dtype


def test_hooks_receive_the_model_which_can_be_freed_and_keeps_its_dtype(saved: Seen) -> None:
    assert saved["forgotten"] == [(True, ["OneBlock"], torch.bfloat16)] * 4


def of_the_config_file(name: str, value: str) -> Any:
    os.environ[name] = value
    plugin = MiCSPlugin()
    assert str(MiCSPlugin(state_dict_type="sharded").state_dict_type) == "StateDictType.SHARDED_STATE_DICT"
    assert MiCSPlugin(offload="optimizer").policy.offload == "optimizer"
    return str(plugin.state_dict_type), plugin.policy._activation_checkpointing, plugin.policy.offload


def test_the_config_file_of_the_launcher_is_read() -> None:
    ((kind, *_),) = on_ranks(of_the_config_file, "FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", world_size=1)
    assert kind == "StateDictType.FULL_STATE_DICT"
    assert on_ranks(of_the_config_file, "FSDP_ACTIVATION_CHECKPOINTING", "true", world_size=1)[0][1] is True
    assert on_ranks(of_the_config_file, "FSDP_OFFLOAD_PARAMS", "true", world_size=1)[0][2] is True
    assert on_ranks(of_the_config_file, "FSDP_OFFLOAD_PARAMS", "false", world_size=1)[0][2] is False


def whole_state() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    step(accelerator, model, optimizer)
    return accelerator.get_state_dict(model)


def test_the_state_dict_is_unsharded(saved: Seen) -> None:
    assert_same(saved["state dict"][0], alone(), 1e-6)


def save_ours(path: Path) -> dict[str, Tensor]:
    accelerator = start(plugin={"partition_size": 4})
    model = TinyModule(kind=OneBlock)
    model, optimizer = accelerator.prepare(model, sgd(model))
    step(accelerator, model, optimizer)
    plugin_of(accelerator).save_checkpoint(accelerator, path, epoch=3)
    return weights(model)


def load_everywhere(folder: Path) -> dict[str, dict[str, Tensor]]:
    accelerator = start()
    model = TinyModule(kind=OneBlock)
    model, _ = accelerator.prepare(model, sgd(model))
    rest = plugin_of(accelerator).load_checkpoint(accelerator, folder / "accelerate.ckpt")
    assert rest["epoch"] == 3
    loaded = {"accelerate": weights(model)}
    fabric = start_fabric()
    of_fabric = TinyModule(kind=OneBlock)
    of_fabric, optimizer = fabric.setup(of_fabric, sgd(of_fabric))
    assert fabric.load(folder / "accelerate.ckpt", {"model": of_fabric, "optimizer": optimizer})["epoch"] == 3
    loaded["fabric"] = weights(of_fabric)
    trained = TinyModule(lr=0.0, kind=OneBlock)
    trainer = make_trainer(folder, strategy=mics(partition_size=4), max_steps=1)
    trainer.fit(trained, loader(), ckpt_path=folder / "accelerate.ckpt")
    loaded["trainer"] = weights(trained)
    trainer.save_checkpoint(folder / "trainer.ckpt")
    plugin_of(accelerator).load_checkpoint(accelerator, folder / "trainer.ckpt")
    assert_same(weights(model), loaded["trainer"])
    return loaded


def test_checkpoints_load_in_the_other_integrations_and_back(saved: Seen, loaded: Seen) -> None:
    ours = saved["ours"][0]
    for by_integration in loaded["everywhere"]:
        for integration in ("accelerate", "fabric"):
            assert_same(by_integration[integration], ours)
        assert not by_integration["trainer"]["net.norm.weight"].equal(ours["net.norm.weight"])  # it went on from there
        assert_same(by_integration["trainer"], ours, 0.5)
