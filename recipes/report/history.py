"""What a run has measured, by optimizer step; saved with checkpoints, so that it begins where the first run began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from recipes.callbacks.log_steps import at_log_step
from recipes.report.curves import LOSSES, Series, draw


class History(L.Callback):
    """Records every logged metric and draws the losses into ``path``, anew at every validation.

    Training metrics are recorded every ``log_every_n_steps``, those of validation, which are called ``val_...``, at its
    end. The training loss is the mean of rank 0's micro-steps since the last time, not the last of them alone.

    Put it behind the callbacks that log.

    Args:
        path: Path of the picture; the suffix is its format.
    """

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)
        self.series: Series = {}
        self._losses: list[Any] = []  # as tensors: reading their value would make a GPU wait

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self._losses.append(metrics["train_loss"])
        if at_log_step(trainer):
            mean = sum(loss.item() for loss in self._losses) / len(self._losses)
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            others = {name: value for name, value in metrics.items() if not name.startswith(("val_", "lr-"))}
            self._note(trainer, others | {"train_loss": mean, "lr": rate})
            self._losses.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self._note(
            trainer, {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        )
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draw(self.series, [LOSSES]).savefig(self.path, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        return {"series": self.series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {name: list(points) for name, points in state_dict["series"].items()}

    def _note(self, trainer: L.Trainer, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.series.setdefault(name, []).append((trainer.global_step, float(value)))
