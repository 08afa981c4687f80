"""The position in an epoch on another number of ranks, and positions that do not exist there."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import ResumableSampler
from lightning_mics.integrations.trainer.resuming import EpochGeometry, position_in_epoch
from tests.support.fits import refusal
from tests.support.models import TinyModule, tokens
from tests.support.trainers import make_trainer, mics, on_ranks

FOUR = EpochGeometry(world_size=4, batch_size=2, micro_steps=4, batches_per_epoch=40)


def pace(ranks: int, *, batch_size: int | None = 2, micro_steps: int) -> EpochGeometry:
    return EpochGeometry(world_size=ranks, batch_size=batch_size, micro_steps=micro_steps, batches_per_epoch=1000)


@pytest.mark.parametrize(
    ("now", "place"),
    [
        (pace(1, micro_steps=16), 48),
        (pace(2, micro_steps=8), 24),
        (pace(8, micro_steps=2), 6),
        (pace(8, batch_size=4, micro_steps=1), 3),
        (pace(1, batch_size=8, micro_steps=4), 12),
        (pace(8, batch_size=None, micro_steps=2), 6),  # as large as before, if the loader has no batch size
        (pace(4, micro_steps=2), 12),  # smaller steps
    ],
)
def test_the_position_is_counted_in_samples_of_all_ranks(now: EpochGeometry, place: int) -> None:
    assert position_in_epoch(12, now=now, saved=FOUR) == place


def test_a_position_between_boundaries_is_rejected_with_a_remedy() -> None:
    fits = "accumulate_grad_batches=2 makes an optimizer step as large as it was$"
    with pytest.raises(ValueError, match=f"after 12 micro-steps of 4 .* 8 ranks and accumulate_grad_batches=4; {fits}"):
        position_in_epoch(12, now=pace(8, micro_steps=4), saved=FOUR)
    with pytest.raises(ValueError, match=r"after 12 .* 5 ranks .*; use a batch size .* whose product divides 32$"):
        position_in_epoch(12, now=pace(5, micro_steps=1), saved=FOUR)


def test_a_position_inside_an_optimizer_step_of_the_saved_run_is_rejected() -> None:
    with pytest.raises(RuntimeError, match=r"saved on 4 ranks after 3 of the 4 micro-steps .* on 2 ranks there is no"):
        position_in_epoch(11, now=pace(2, micro_steps=8), saved=FOUR)


# -- under a Trainer ---------------------------------------------------------------------------------------------------


class Saving(TinyModule):
    """Saves after two and three micro-steps, if it is given a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.folder is not None and batch_idx in (1, 2):
            self.trainer.save_checkpoint(self.folder / f"{batch_idx + 1}.ckpt")


def _fit(
    module: Saving, folder: Path, *, micro_steps: int = 2, ckpt_path: Path | None = None, **options: Any
) -> pl.Trainer:
    data = tokens(34)
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False), drop_last=True)
    trainer = make_trainer(
        folder,
        strategy=mics(ranks_per_node=1),
        devices=dist.get_world_size(),
        accumulate_grad_batches=micro_steps,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def _save(folder: Path) -> None:
    _fit(Saving(folder), folder).save_checkpoint(folder / "whole.ckpt")
    _fit(Saving(), folder, max_steps=2).save_checkpoint(folder / "cut.ckpt")


def _resume(folder: Path, cases: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """The error and the warnings of resuming from each checkpoint, with a number of micro-steps per step."""
    facts = []
    for name, micro_steps in cases:
        resume = partial(_fit, Saving(), folder, micro_steps=micro_steps, ckpt_path=folder / name, max_epochs=2)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            error = refusal(resume)
        facts.append((error, "\n".join(str(each.message) for each in heard)))
    return facts


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("heard")
    on_ranks(_save, folder, world_size=2)
    cases = [("2.ckpt", 4), ("2.ckpt", 3), ("3.ckpt", 4)]
    one = on_ranks(_resume, folder, cases, world_size=1)[0]
    two = on_ranks(_resume, folder, [(f"{name}.ckpt", 2) for name in ("2", "3", "whole", "cut")], world_size=2)[0]
    return dict(zip(("fits", "does not fit", "inside a step"), one, strict=True)) | dict(
        zip(("same ranks", "same ranks, inside a step", "whole epoch", "cut epoch"), two, strict=True)
    )


def test_a_loader_that_may_not_count_all_ranks_is_warned_of(heard: dict[str, Any]) -> None:
    error, told = heard["fits"]
    assert error == "nothing was refused"
    assert "resumes with 1 ranks after 2" in told
    assert "DataLoader may repeat or skip some" in told
    assert "resumes with" not in heard["same ranks"][1]


def test_an_epoch_with_another_number_of_steps_is_warned_of(heard: dict[str, Any]) -> None:
    assert (
        "an epoch had 4 optimizer steps on 2 ranks and has 5 on 1; accumulate_grad_batches=4 makes" in heard["fits"][1]
    )
    assert "an epoch had" not in heard["same ranks"][1]


def test_other_optimizer_steps_are_rejected_when_training_starts(heard: dict[str, Any]) -> None:
    error, _ = heard["does not fit"]
    assert error.startswith("ValueError: the checkpoint was saved after 2 micro-steps of 2 ranks")
    assert error.endswith("accumulate_grad_batches=4 makes an optimizer step as large as it was")


def test_missing_gradients_are_rejected_on_other_ranks_and_warned_of_on_the_same(heard: dict[str, Any]) -> None:
    error, _ = heard["inside a step"]
    assert error.startswith("RuntimeError: the checkpoint was saved on 2 ranks after 1 of the 2 micro-steps")
    error, told = heard["same ranks, inside a step"]
    assert error == "nothing was refused"
    assert "saved after 1 of 2 micro-steps of an optimizer step; their gradients are not in it" in told
    assert "gradients are not in it" not in heard["same ranks"][1]


def test_what_is_left_of_an_epoch_is_warned_of_where_a_checkpoint_after_the_fit_has_lost_it(
    heard: dict[str, Any],
) -> None:
    told = "saved after a fit that ended after 4 batches of an epoch"
    assert heard["cut epoch"][0] == heard["whole epoch"][0] == "nothing was refused"
    assert told in heard["cut epoch"][1]
    assert not any("saved after a fit" in heard[name][1] for name in ("whole epoch", "same ranks"))


class Averaging(TinyModule):
    """Keeps a mean of its own samples in a buffer, and every loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.losses: dict[int, str] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(batch.float().mean())
        loss = super().training_step(batch, batch_idx) * (1 + self.mean / 100)
        self.losses[batch_idx] = loss.item().hex()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("value", float(self.global_step))


def _resumed_in_a_window(folder: Path) -> dict[str, Any]:
    """Losses of a run and of one that resumes after its second step, and the files that the latter has written."""
    facts: dict[str, Any] = {}
    for name, ckpt_path in (("whole", None), ("resumed", folder / "whole" / "steps" / "epoch=0-step=2.ckpt")):
        module = Averaging()
        monitoring = ModelCheckpoint(folder / name / "monitored", monitor="value", save_top_k=-1, filename="{step}")
        trainer = make_trainer(
            folder,
            strategy=mics(ranks_per_node=1),
            devices=dist.get_world_size(),
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
            callbacks=[ModelCheckpoint(folder / name / "steps", every_n_train_steps=2, save_top_k=-1), monitoring],
            enable_checkpointing=True,
            max_steps=4,
            val_check_interval=4,
            limit_val_batches=1,
        )
        data: Any = tokens(34)
        loader = StatefulDataLoader(data, batch_size=2, sampler=ResumableSampler(data, global_batch_size=8))
        trainer.fit(module, loader, val_dataloaders=DataLoader(tokens(4), batch_size=2), ckpt_path=ckpt_path)
        facts[name] = module.losses
        facts[f"{name} steps"], facts[f"{name} monitored"] = (
            sorted(path.name for path in (folder / name / kind).iterdir()) for kind in ("steps", "monitored")
        )
    return facts


def test_a_resumed_run_does_not_save_its_step_again_in_the_next_window(tmp_path: Path) -> None:
    for facts in on_ranks(_resumed_in_a_window, tmp_path, world_size=2):
        assert facts["whole steps"] == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]
        assert facts["resumed steps"] == ["epoch=0-step=4.ckpt"]
        assert facts["resumed"] == {number: facts["whole"][number] for number in range(4, 8)}
        assert facts["resumed monitored"] == facts["whole monitored"] == ["step=2.ckpt", "step=4.ckpt"]
