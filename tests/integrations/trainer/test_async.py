"""``async_save``: training continues while checkpoints are written, and ModelCheckpoint works as before."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_mics.checkpoint.storage.folder import CheckpointFolder, is_sharded
from tests.support.fits import fit, same, whole_weights
from tests.support.trainers import mics, on_ranks


class Gate:
    """Holds each checkpoint back after its files are written and before it is published."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.publish, gate = CheckpointFolder.publish, self

        def wait_and_publish(folder: CheckpointFolder, *args: Any) -> None:
            gate.reached.set()
            assert gate.open.wait(timeout=60)
            gate.publish(folder, *args)

        CheckpointFolder.publish = wait_and_publish  # type: ignore[method-assign]


class Watch(Callback):
    """Records the files present after each step, and opens the gate when training has continued for two steps."""

    def __init__(self, gate: Gate, folder: Path) -> None:
        self.gate, self.folder = gate, folder
        self.names: list[list[str]] = []
        self.weights: list[Any] = []
        self.link_is_whole: list[bool | None] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(whole_weights(pl_module))
        self.names.append(sorted(path.name for path in self.folder.glob("*.ckpt") if path.exists()))
        link = self.folder / "last.ckpt"
        self.link_is_whole.append((link / "manifest.json").exists() if link.exists() else None)
        if trainer.global_step == 3:
            self.gate.open.set()


def _save_beside_training(folder: Path) -> dict[str, Any]:
    gate = Gate()
    saving = ModelCheckpoint(
        dirpath=folder, filename="{step}", monitor="step", mode="max", save_top_k=1, save_last="link",
        every_n_train_steps=1, save_on_train_epoch_end=False,
    )  # fmt: skip
    watch = Watch(gate, folder)
    fit(folder, epochs=2, strategy=mics(async_save=True), callbacks=[saving, watch])
    after = sorted(path.name for path in folder.glob("*.ckpt"))
    _, recorder = fit(folder, ckpt_path=str(folder / "step=4.ckpt"), epochs=3)
    return {
        "names": watch.names,
        "links": watch.link_is_whole,
        "after": after,
        "link": os.readlink(folder / "last.ckpt"),
        "saved": recorder.started,
        "at step 4": watch.weights[3],
        "reached": gate.reached.is_set(),
    }


@pytest.fixture(scope="module")
def beside_training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(_save_beside_training, tmp_path_factory.mktemp("async"), world_size=2)[0]


def test_training_continues_while_a_checkpoint_is_written(beside_training: dict[str, Any]) -> None:
    assert beside_training["reached"]
    assert beside_training["names"][:2] == [[], []]  # two steps, and neither's checkpoint is there


def test_the_end_of_the_fit_waits_and_only_the_wanted_checkpoints_are_left(beside_training: dict[str, Any]) -> None:
    assert beside_training["after"] == ["last.ckpt", "step=4.ckpt"]
    assert beside_training["link"] == "step=4.ckpt"


def test_the_last_link_points_to_a_complete_checkpoint_or_to_none(beside_training: dict[str, Any]) -> None:
    assert set(beside_training["links"]) <= {None, True}


def test_a_checkpoint_holds_the_state_of_its_step(beside_training: dict[str, Any]) -> None:
    assert same(beside_training["saved"], beside_training["at step 4"])


def _fail_to_publish(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    saving = ModelCheckpoint(
        dirpath=folder, filename="{epoch}", monitor="epoch", mode="max", save_top_k=1, every_n_epochs=1
    )
    publish = CheckpointFolder.publish

    def fail_the_second(self: CheckpointFolder, *args: Any) -> None:
        if self.path.name == "epoch=1.ckpt":
            raise OSError(28, "No space left on device", str(self.path))
        publish(self, *args)

    CheckpointFolder.publish = fail_the_second  # type: ignore[method-assign]
    try:
        fit(folder, epochs=2, strategy=mics(async_save=True), callbacks=[saving])
    except RuntimeError as error:
        facts["error"] = str(error)
    facts["names"] = sorted(path.name for path in folder.glob("*.ckpt"))
    facts["started"] = bool(fit(folder, ckpt_path=str(folder / "epoch=0.ckpt"), epochs=2)[1].started)
    return facts


def test_a_save_that_fails_is_reported_on_all_ranks_and_leaves_the_previous_one(tmp_path: Path) -> None:
    for facts in on_ranks(_fail_to_publish, tmp_path, world_size=2):
        assert "epoch=1.ckpt" in facts["error"]
        assert "No space left on device" in facts["error"]
        assert facts["names"] == ["epoch=0.ckpt"]
        assert facts["started"]


def _save_after_the_fit(folder: Path) -> bool:
    trainer, _ = fit(folder, strategy=mics(async_save=True))
    trainer.save_checkpoint(folder / "mine.ckpt")
    return is_sharded(folder / "mine.ckpt")


def test_a_save_after_the_fit_is_synchronous(tmp_path: Path) -> None:
    assert all(on_ranks(_save_after_the_fit, tmp_path, world_size=2))


def test_asynchronous_full_files_are_rejected() -> None:
    with pytest.raises(ValueError, match='async_save=True needs state_dict_type="sharded"'):
        mics(async_save=True, state_dict_type="full")


def _link_before_anything_is_written(folder: Path) -> str:
    linked, begin = threading.Event(), CheckpointFolder.begin

    class Linking(ModelCheckpoint):
        def on_train_epoch_end(self, *args: Any) -> None:
            super().on_train_epoch_end(*args)
            linked.set()

    def begin_late(self: CheckpointFolder) -> Path:
        assert linked.wait(timeout=10)
        return begin(self)

    CheckpointFolder.begin = begin_late  # type: ignore[method-assign]
    saving = Linking(dirpath=folder / "new", filename="{step}", monitor="step", mode="max", save_last="link")
    fit(folder, strategy=mics(async_save=True), callbacks=[saving])
    return os.readlink(folder / "new" / "last.ckpt")


def test_the_first_checkpoint_of_a_new_folder_can_be_linked_before_it_is_there(tmp_path: Path) -> None:
    (name, other) = on_ranks(_link_before_anything_is_written, tmp_path, world_size=2)
    assert name == other
    assert is_sharded(tmp_path / "new" / name)
