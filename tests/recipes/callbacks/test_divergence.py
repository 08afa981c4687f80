"""A run that diverges stops on all ranks, and leaves its good checkpoints as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.callbacks.divergence import DivergedError, StopIfDiverged
from tests.support.forked import Run
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer


class Diverges(TinyModule):
    """The loss of rank 2 is NaN in one step only: from then on all ranks' weights are, and all losses."""

    def __init__(self, *, step: int) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step + 1 == self.step and dist.get_rank() == 2 else loss


class Overflows(TinyModule):
    """Weights become infinite after a step whose loss is a number."""

    def __init__(self, *, step: int) -> None:
        super().__init__()
        self.step = step

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step + 1 == self.step:
            for group in optimizer.param_groups:
                group["lr"] = math.inf


def _fit(folder: str, model: Any, log_every_n_steps: int, save_every: int) -> tuple[str, int]:
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    trainer = make_trainer(
        folder,
        callbacks=[StopIfDiverged(), saving],
        enable_checkpointing=True,
        log_every_n_steps=log_every_n_steps,
        accumulate_grad_batches=2,
        max_epochs=8,
    )
    with pytest.raises(DivergedError) as caught:
        trainer.fit(model, loader(32))  # two steps of two micro-steps in each epoch
    return str(caught.value), trainer.global_step


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def test_nan_on_one_rank_stops_all_and_names_its_step_and_the_last_good_checkpoint(
    tmp_path: Path, on_shared_ranks: Run
) -> None:
    results = on_shared_ranks(_fit, str(tmp_path), Diverges(step=4), 5, 3)
    assert len(set(results)) == 1
    message, stopped_after = results[0]
    assert stopped_after == 5  # the next step that is logged
    good = tmp_path / "step=3.ckpt"
    assert message.startswith(
        f"training has diverged: the training loss of rank 2 is not finite in step 4; the last good"
        f" checkpoint is {good}. Resume it by resume={good} and a smaller"
    )
    assert saved(tmp_path) == ["step=3.ckpt"]


def test_no_checkpoint_is_saved_between_the_loss_and_the_step_that_is_logged(
    tmp_path: Path, on_shared_ranks: Run
) -> None:
    for message, stopped_after in on_shared_ranks(_fit, str(tmp_path), Diverges(step=1), 50, 2):
        advice = "no checkpoint is saved yet, start again with a lower optimizer.lr"
        assert f"rank 2 is not finite in step 1; {advice}" in message
        assert stopped_after == 2
    assert not saved(tmp_path)


def test_weights_that_overflowed_are_not_saved_although_the_loss_was_a_number(
    tmp_path: Path, on_shared_ranks: Run
) -> None:
    for message, stopped_after in on_shared_ranks(_fit, str(tmp_path), Overflows(step=2), 50, 1):
        assert "weights are not finite after step 2; the last good checkpoint is" in message
        assert f"resume={tmp_path / 'step=1.ckpt'}" in message
        assert stopped_after == 2
    assert saved(tmp_path) == ["step=1.ckpt"]


def test_a_validation_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="auto", devices=1)
    trainer.state.fn = "fit"  # type: ignore[assignment]
    trainer.callback_metrics["val_loss"] = torch.tensor(math.inf)
    with pytest.raises(DivergedError, match="the validation loss is inf after step 0"):
        StopIfDiverged().on_validation_end(trainer, TinyModule())


def test_a_run_whose_losses_are_numbers_ends_as_it_would(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, strategy="auto", devices=1, callbacks=[StopIfDiverged()], log_every_n_steps=1, max_steps=3
    )
    trainer.fit(TinyModule(), loader(16), loader(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.global_step == 3 and saved(tmp_path) == ["a.ckpt"]
