"""Checkpoints of a Trainer: Lightning's ModelCheckpoint, ``ckpt_path``, other numbers of ranks, consolidated files."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from tests.support.fits import STEPS_PER_EPOCH, AdamModule, Scored, data, files, fit, same, whole_weights
from tests.support.trainers import mics, on_ranks

SHARDS_OF_TWO = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


def _uninterrupted(folder: Path) -> dict[str, Any]:
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_last=True)
    trainer, recorder = fit(folder, epochs=2, callbacks=[saving])
    content = torch.load(folder / "epoch=0.ckpt" / "meta.pt", weights_only=True)
    return {
        "first": recorder.started,
        "weights": recorder.after_epoch,
        "losses": recorder.losses,
        "rates": recorder.rates,
        "files": {name: files(folder / name) for name in files(folder)},
        "meta": sorted(content),
        "callbacks": list(content["callbacks"]),
        "tensors in meta": sum(isinstance(entry, Tensor) for entry in content.values()),
        "names": list(trainer.strategy.lightning_module_state_dict()),
        "sizes": [entry.stat().st_size for entry in sorted((folder / "epoch=0.ckpt").glob("*.distcp"))],
    }


class SaveAtStart(Callback):
    """Saves what a run has loaded before it resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _resumed(folder: Path, settings: list[tuple[str, dict[str, int]]]) -> list[dict[str, Any]]:
    facts = []
    for source, options in settings:
        again = SaveAtStart(folder / f"of_{dist.get_world_size()}.ckpt")
        trainer, recorder = fit(
            folder, ckpt_path=folder / source, epochs=2, strategy=mics(**options), callbacks=[again]
        )
        facts.append({"weights": recorder.started, "losses": recorder.losses, "rates": recorder.rates})
        facts[-1]["partition_size"] = trainer.strategy.topology.partition_size
    return facts


def _forgetful(folder: Path) -> list[float]:
    class Forget(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].state.clear()

    return fit(
        folder, ckpt_path=folder / "epoch=0.ckpt", epochs=2, strategy=mics(ranks_per_node=1), callbacks=[Forget()]
    )[1].losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two epochs on 4 ranks with partition groups of 2, with a checkpoint after each epoch."""
    folder = tmp_path_factory.mktemp("saved")
    return {**on_ranks(_uninterrupted, folder)[0], "folder": folder}


@pytest.fixture(scope="module")
def resumed(saved: dict[str, Any]) -> dict[str, Any]:
    """The second epoch again from the checkpoint after the first, by world size and partition size."""
    folder, of_four = saved["folder"], "epoch=0.ckpt"
    (eight,) = on_ranks(_resumed, folder, [(of_four, {"partition_size": 4})], world_size=8)[0]
    (two,) = on_ranks(_resumed, folder, [(of_four, {"partition_size": 2})], world_size=2)[0]
    (one,) = on_ranks(_resumed, folder, [(of_four, {"ranks_per_node": 1})], world_size=1)[0]
    same_size, whole_world, replicas, back = on_ranks(
        _resumed,
        folder,
        [
            (of_four, {"partition_size": 2}),
            (of_four, {"partition_size": 4}),
            (of_four, {"partition_size": 1}),
            ("of_8.ckpt", {"partition_size": 2}),
        ],
    )[0]
    return {
        "4 ranks, partition groups of 2": same_size,
        "4 ranks, partition groups of 4": whole_world,
        "4 ranks, partition groups of 1": replicas,
        "2 ranks": two,
        "1 rank": one,
        "8 ranks, partition groups of 4 over 2 nodes": eight,
        "from 8 ranks back to 4": back,
    }


RESUMED = {  # how it was resumed: the partition size there
    "4 ranks, partition groups of 2": 2,
    "4 ranks, partition groups of 4": 4,
    "4 ranks, partition groups of 1": 1,
    "2 ranks": 2,
    "1 rank": 1,
    "8 ranks, partition groups of 4 over 2 nodes": 4,
    "from 8 ranks back to 4": 2,
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_restores_the_weights_bit_for_bit(saved: Any, resumed: Any, name: str) -> None:
    assert not same(saved["first"], saved["weights"][0])
    assert resumed[name]["partition_size"] == RESUMED[name]
    assert same(resumed[name]["weights"], saved["weights"][0])


@pytest.mark.parametrize("name", RESUMED)
def test_the_losses_after_resuming_are_those_of_the_uninterrupted_run(saved: Any, resumed: Any, name: str) -> None:
    assert resumed[name]["losses"] == pytest.approx(saved["losses"][STEPS_PER_EPOCH:], abs=1e-6)
    assert resumed[name]["rates"] == saved["rates"][STEPS_PER_EPOCH:]
    assert saved["rates"][-1] != saved["rates"][0]


def test_without_the_optimizer_states_the_losses_would_differ(saved: dict[str, Any]) -> None:
    losses = on_ranks(_forgetful, saved["folder"], world_size=1)[0]
    assert losses[0] == pytest.approx(saved["losses"][STEPS_PER_EPOCH], abs=1e-6)
    assert abs(losses[1] - saved["losses"][STEPS_PER_EPOCH + 1]) > 1e-3


def test_a_sharded_checkpoint_holds_shards_and_metadata_only(saved: dict[str, Any]) -> None:
    shards = [f"__{rank}_0.distcp" for rank in range(4)]
    files = [".metadata", *shards, "manifest.json", "meta.pt"]
    assert saved["files"] == dict.fromkeys(("epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"), files)
    assert {"pytorch-lightning_version", "callbacks", "lr_schedulers", "loops"} <= set(saved["meta"])
    assert not {"state_dict", "optimizer_states"} & set(saved["meta"])
    assert saved["tensors in meta"] == 0
    assert any("ModelCheckpoint" in name for name in saved["callbacks"])


def test_replicas_share_the_writing(saved: dict[str, Any]) -> None:
    assert max(saved["sizes"]) < sum(saved["sizes"]) / 2


def test_the_state_dict_has_the_names_of_the_unsharded_model(saved: dict[str, Any]) -> None:
    assert saved["names"] == list(AdamModule().state_dict())


def _model_checkpoint(folder: Path) -> dict[str, Any]:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=folder / "top", filename="{epoch}", monitor="score", mode="max", save_top_k=1, save_last="link"
        )

    trainer, recorder = fit(folder, Scored, epochs=3, callbacks=[saving()], validate=True)
    module = trainer.lightning_module
    facts: dict[str, Any] = {
        "files": files(folder / "top"),
        "link": (folder / "top" / "last.ckpt").is_symlink(),
        "epochs": recorder.after_epoch,
        "end": whole_weights(module),
    }
    trainer.test(module, data(), ckpt_path="best")
    facts["best"] = whole_weights(module)
    _, again = fit(folder, Scored, ckpt_path="last", epochs=4, callbacks=[saving()], validate=True)
    facts["last"] = again.started
    rolling = ModelCheckpoint(dirpath=folder / "rolling", filename="{epoch}", save_top_k=1, save_last=True)
    _, recorder = fit(folder, epochs=2, callbacks=[rolling])
    facts["rolling"] = {name: files(folder / "rolling" / name) for name in files(folder / "rolling")}
    facts["rolling epochs"] = recorder.after_epoch
    facts["from path"] = fit(folder, ckpt_path=str(folder / "rolling" / "epoch=1.ckpt"), epochs=3)[1].started
    rolling = ModelCheckpoint(dirpath=folder / "rolling", filename="{epoch}", save_top_k=1, save_last=True)
    facts["rolling last"] = fit(folder, ckpt_path="last", epochs=3, callbacks=[rolling])[1].started
    return facts


@pytest.fixture(scope="module")
def model_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(_model_checkpoint, tmp_path_factory.mktemp("model_checkpoint"), world_size=2)[0]


def test_only_the_best_checkpoint_stays_with_save_top_k_1(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["files"] == ["epoch=1.ckpt", "last.ckpt"]


def test_save_last_can_be_a_link(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["link"]
    assert same(model_checkpoint["last"], model_checkpoint["epochs"][1])


def test_ckpt_path_best_loads_the_best_after_fit(model_checkpoint: dict[str, Any]) -> None:
    assert not same(model_checkpoint["end"], model_checkpoint["epochs"][1])
    assert same(model_checkpoint["best"], model_checkpoint["epochs"][1])


def test_ckpt_path_last_or_a_path_resume_from_directories(model_checkpoint: dict[str, Any]) -> None:
    assert model_checkpoint["rolling"] == {"epoch=1.ckpt": SHARDS_OF_TWO, "last.ckpt": SHARDS_OF_TWO}
    assert same(model_checkpoint["rolling last"], model_checkpoint["rolling epochs"][1])
    assert same(model_checkpoint["from path"], model_checkpoint["rolling epochs"][1])


@pytest.fixture(scope="module")
def consolidated(saved: dict[str, Any]) -> Path:
    """The checkpoint after the first epoch of ``saved``, made one file by Lightning's own program."""
    source, target = saved["folder"] / "epoch=0.ckpt", saved["folder"] / "consolidated.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consolidate_checkpoint", str(source), "--output_file", str(target)])
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    return target


def _resume_consolidated(path: Path, strategies: list[str]) -> list[dict[str, Any]]:
    facts = []
    for strategy in strategies:
        chosen = mics(state_dict_type="full") if strategy == "mics" else strategy
        trainer, recorder = fit(path.parent, ckpt_path=path, epochs=2, strategy=chosen)
        facts.append({"weights": recorder.started, "losses": recorder.losses, "with": type(trainer.strategy).__name__})
    return facts


@pytest.mark.parametrize(("world_size", "strategies"), [(2, ["ddp", "mics"]), (1, ["auto"])])
def test_a_consolidated_checkpoint_resumes_anywhere(
    saved: Any, consolidated: Path, world_size: int, strategies: list[str]
) -> None:
    facts = on_ranks(_resume_consolidated, consolidated, strategies, world_size=world_size)[0]
    assert [each["with"] for each in facts] == (
        ["SingleDeviceStrategy"] if world_size == 1 else ["DDPStrategy", "MiCSStrategy"]
    )
    for each in facts:
        assert same(each["weights"], saved["weights"][0])
        assert each["losses"] == pytest.approx(saved["losses"][STEPS_PER_EPOCH:], abs=1e-6)


def test_a_consolidated_checkpoint_loads_into_an_unsharded_module(saved: Any, consolidated: Path) -> None:
    module = AdamModule.load_from_checkpoint(consolidated, weights_only=True)
    assert same(module.state_dict(), saved["weights"][0])
