from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from recipes.callbacks.gradient_norm import GradientNorm, gradient_norm
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer, on_ranks


class Watched(TinyModule):
    """Clips to nearly nothing, and notes the whole gradients before, and what taking their norm communicates."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.collectives: list[int] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        whole = [parameter.grad.full_tensor() for parameter in self.parameters()]
        self.norms.append(torch.cat([gradient.flatten() for gradient in whole]).norm().item())
        with CommDebugMode() as counted:
            gradient_norm(self)
        self.collectives.append(counted.get_total_counts())


def _fit(folder: str) -> dict[str, Any]:
    logged: list[tuple[int, float]] = []

    class Noted(GradientNorm):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if "grad_norm" in trainer.callback_metrics:
                logged.append((trainer.global_step, trainer.callback_metrics["grad_norm"].item()))

    model = Watched()
    trainer = make_trainer(
        folder, callbacks=[Noted()], log_every_n_steps=2, accumulate_grad_batches=2, max_steps=2, gradient_clip_val=1e-3
    )
    trainer.fit(model, loader(32))
    return {"logged": logged, "norms": model.norms, "collectives": model.collectives}


def test_the_norm_is_that_of_whole_gradients_before_clipping_at_steps_that_are_logged(tmp_path: Path) -> None:
    for result in on_ranks(_fit, str(tmp_path)):
        ((step, logged),) = result["logged"]
        assert step == 2
        assert logged == pytest.approx(result["norms"][1], rel=1e-5)
        assert logged > 1e-2  # ten times what clipping leaves
        assert result["collectives"] == [1, 1]
