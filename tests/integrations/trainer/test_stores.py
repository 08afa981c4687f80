"""Checkpoints of a Trainer in a store: ModelCheckpoint, resuming, removing, and errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mics.checkpoint import inspect
from lightning_mics.checkpoint.storage.path import storage_path
from recipes.job.resume import find_saved_runs
from tests.support.fits import STEPS_PER_EPOCH, Scored, data, fit, refusal, same, whole_weights
from tests.support.forked import Run
from tests.support.s3 import Fault, fault, s3
from tests.support.trainers import mics, on_ranks

__all__ = ["fault", "s3"]


def names(url: str) -> list[str]:
    """The checkpoints in a folder of the store."""
    dist.barrier()
    folder = storage_path(url)
    folder.fs.invalidate_cache()
    found = sorted(child.name for child in folder.iterdir())
    dist.barrier()
    return found


def _model_checkpoint(url: str, folder: Path) -> dict[str, Any]:
    saving = ModelCheckpoint(
        dirpath=f"{url}/top", filename="{epoch}", monitor="score", mode="max", save_top_k=1, save_last=True
    )
    trainer, recorder = fit(folder, Scored, epochs=3, callbacks=[saving], validate=True)
    facts: dict[str, Any] = {"names": names(f"{url}/top"), "here": sorted(path.name for path in folder.iterdir())}
    trainer.test(trainer.lightning_module, data(), ckpt_path="best")
    facts["best"] = same(whole_weights(trainer.lightning_module), recorder.after_epoch[1])
    last = f"{url}/top/last.ckpt"
    _, again = fit(folder, Scored, ckpt_path=last, epochs=4, strategy=mics(partition_size=1), validate=True)
    facts["last"] = same(again.started, recorder.after_epoch[1])  # ModelCheckpoint saves it when it saves the best
    facts["slots"] = same(again.slots, recorder.slots_after_epoch[1])
    facts["losses"] = len(again.losses)
    facts["runs"] = [
        [(str(run.path), run.step) for run in find_saved_runs(resume, checkpoint_dir=f"{url}/top")]
        for resume in ("last", last)
    ]
    facts["no run"] = refusal(lambda: find_saved_runs(f"{url}/nowhere.ckpt", checkpoint_dir=f"{url}/top"))
    facts["inspect"] = inspect.main([last])
    return facts


@pytest.fixture(scope="module")
def model_checkpoint(s3: str, tmp_path_factory: pytest.TempPathFactory, on_shared_ranks: Run) -> list[dict[str, Any]]:
    return on_shared_ranks(_model_checkpoint, s3, tmp_path_factory.mktemp("here"), world_size=2)


def test_model_checkpoint_keeps_the_best_and_the_last_in_the_store_and_nothing_locally(model_checkpoint: Any) -> None:
    assert model_checkpoint[0]["names"] == ["epoch=1.ckpt", "last.ckpt"]
    assert model_checkpoint[0]["here"] == []


def test_best_and_last_are_loaded_from_the_store(model_checkpoint: Any) -> None:
    for facts in model_checkpoint:
        assert facts["best"]
        assert facts["last"] and facts["slots"]
        assert facts["losses"] == 2 * STEPS_PER_EPOCH
        assert facts["inspect"] == 0


def test_the_recipe_resumes_from_the_store(model_checkpoint: Any) -> None:
    last, best = "s3://checkpoints/top/last.ckpt", "s3://checkpoints/top/epoch=1.ckpt"
    assert model_checkpoint[0]["runs"] == [[(last, 4), (best, 4)], [(last, 4)]]
    assert "nowhere.ckpt: there is no such checkpoint" in model_checkpoint[0]["no run"]


def _full(url: str, folder: Path) -> dict[str, Any]:
    saving = ModelCheckpoint(dirpath=f"{url}/full", filename="{epoch}", save_top_k=1)
    strategy = mics(state_dict_type="full")
    _, recorder = fit(folder, epochs=2, callbacks=[saving], strategy=strategy)
    facts: dict[str, Any] = {"names": names(f"{url}/full")}
    _, again = fit(folder, ckpt_path=f"{url}/full/epoch=1.ckpt", epochs=3)
    facts["same"] = same(again.started, recorder.after_epoch[1]) and same(again.slots, recorder.slots_after_epoch[1])
    return facts


def test_full_files_are_saved_to_and_loaded_from_the_store(s3: str, tmp_path: Path, on_shared_ranks: Run) -> None:
    for facts in on_shared_ranks(_full, s3, tmp_path, world_size=2):
        assert facts == {"names": ["epoch=1.ckpt"], "same": True}


def _cut(url: str, folder: Path, fault: Fault) -> dict[str, Any]:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=f"{url}/cut", filename="{epoch}", save_top_k=-1)

    class CutSecond(pl.Callback):
        """The second checkpoint meets a network that fails."""

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1 and dist.get_rank() == 0:
                self.cutting = fault.cutting(r"PUT \S*/__1_0\.distcp ")
                self.cutting.__enter__()
            dist.barrier()

    cut = CutSecond()
    facts: dict[str, Any] = {"error": refusal(lambda: fit(folder, epochs=2, callbacks=[saving(), cut]))}
    facts["hits"] = fault.hits
    dist.barrier()
    if dist.get_rank() == 0:
        cut.cutting.__exit__(None, None, None)
    facts["names"] = names(f"{url}/cut")
    fit(folder, ckpt_path=f"{url}/cut/epoch=0.ckpt", epochs=2, callbacks=[saving()])
    facts["again"] = names(f"{url}/cut")
    return facts


def test_a_run_whose_upload_is_cut_ends_with_an_error_and_resumes_from_the_previous_checkpoint(
    s3: str, fault: Fault, tmp_path: Path
) -> None:
    for facts in on_ranks(_cut, s3, tmp_path, fault, world_size=2):
        assert facts["hits"] > 0
        assert "checkpoint s3://checkpoints/cut/epoch=1.ckpt was not saved" in facts["error"]
        assert facts["names"] == ["epoch=0.ckpt"]
        assert facts["again"] == ["epoch=0.ckpt", "epoch=1.ckpt"]


def _refused(url: str, folder: Path) -> dict[str, str]:
    link = ModelCheckpoint(dirpath=f"{url}/linked", save_last="link")
    facts = {"link": refusal(lambda: fit(folder, callbacks=[link]))}
    with mock.patch.dict(sys.modules, {"gcsfs": None}):
        facts["driver"] = refusal(lambda: fit(folder, ckpt_path="gs://bucket/a.ckpt"))
    facts["protocol"] = refusal(lambda: fit(folder, ckpt_path="nosuch://bucket/a.ckpt"))
    facts["path"] = refusal(lambda: fit(folder, ckpt_path=Path("s3://bucket/a.ckpt")))
    return facts


def test_links_in_stores_missing_drivers_and_invalid_urls_are_rejected_on_all_ranks(
    s3: str, tmp_path: Path, on_shared_ranks: Run
) -> None:
    for facts in on_shared_ranks(_refused, s3, tmp_path, world_size=2):
        assert "save_last='link'" in facts["link"] and "s3://checkpoints/linked" in facts["link"]  # Lightning's own
        assert facts["driver"].startswith("ImportError: gs://bucket/a.ckpt needs a driver of fsspec")
        assert "gcsfs" in facts["driver"]
        assert facts["protocol"].startswith("ValueError: ") and "nosuch" in facts["protocol"]
        assert "'s3:/bucket/a.ckpt' has lost a slash" in facts["path"]
