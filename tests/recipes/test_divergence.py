"""A run that diverges stops on all ranks, and leaves its good checkpoint as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.divergence import DivergedError, GradientNorm
from tests.models import TinyModule
from tests.trainers import loader, make_trainer, on_ranks


class Diverges(TinyModule):
    """The last rank's loss is NaN from one step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        diverged = self.global_step + 1 == self.step and dist.get_rank() == dist.get_world_size() - 1
        return loss * (math.nan if diverged else 1.0)


def _fit(folder: str, step: int) -> dict[str, Any]:
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        folder, callbacks=[GradientNorm(), saving], enable_checkpointing=True, log_every_n_steps=1, max_epochs=4
    )
    try:
        trainer.fit(Diverges(step), loader(16))
    except DivergedError as error:
        return {"said": str(error), "step": trainer.global_step}
    return {"norm": trainer.callback_metrics["grad_norm"].item()}


def test_nan_on_one_rank_stops_all_in_that_step_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    for result in on_ranks(_fit, str(tmp_path), 4):
        assert result["step"] == 3
        assert result["said"].startswith("training has diverged: the gradients are not finite in step 4; the last good")
        assert f"resume={tmp_path / 'step=3.ckpt'}" in result["said"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in (1, 2, 3)]


def test_before_the_first_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    for result in on_ranks(_fit, str(tmp_path), 1):
        assert "in step 1; nothing is saved yet: begin with a lower optimizer.lr" in result["said"]
    assert not list(tmp_path.glob("*.ckpt"))


def _norms(folder: str) -> tuple[float, float, float]:
    """What is logged, what clipping to a tenth of it found, and what is left after."""
    found: list[float] = []

    class Watched(TinyModule):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            found.append(torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3).full_tensor().item())

    trainer = make_trainer(folder, callbacks=[GradientNorm()], log_every_n_steps=1, max_steps=1)
    trainer.fit(Watched(), loader(16))
    return trainer.callback_metrics["grad_norm"].item(), found[0], found[-1]


def test_the_norm_is_that_of_all_shards_before_clipping(tmp_path: Path) -> None:
    for logged, clipped, _ in on_ranks(_norms, str(tmp_path)):
        assert logged == pytest.approx(clipped, rel=1e-6)
        assert logged > 1e-3


def test_a_validation_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="auto", devices=1)
    trainer.state.fn = "fit"  # type: ignore[assignment]
    trainer.callback_metrics["val_loss"] = torch.tensor(math.inf)
    with pytest.raises(DivergedError, match="the validation loss is inf, not finite in step 0"):
        GradientNorm().on_validation_end(trainer, TinyModule())
