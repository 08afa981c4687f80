"""A picture of the training and the validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


class LossCurves(L.Callback):
    """Draws the losses over optimizer steps into ``path``, anew at every validation.

    They are saved with checkpoints, so the curves of a resumed run begin where the first run began.

    Args:
        path: Of the picture; its ending says the format.
        every_n_steps: A point of the training curve is the mean of rank 0's micro-steps of so many optimizer steps.
    """

    def __init__(self, *, path: str, every_n_steps: int) -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.train: list[tuple[int, float]] = []  # (step, loss)
        self.val: list[tuple[int, float]] = []
        self._recent: list[Any] = []  # losses as tensors: reading their value would make a GPU wait

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._recent.append(trainer.callback_metrics["train_loss"])
        full = len(self._recent) >= self.every_n_steps * trainer.accumulate_grad_batches
        if full:
            self.train.append((trainer.global_step, sum(loss.item() for loss in self._recent) / len(self._recent)))
            self._recent.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.val.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))
        if trainer.is_global_zero:
            self.draw()

    def draw(self) -> None:
        from matplotlib.figure import Figure  # not pyplot, which picks a display; imported late, for it is slow

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)")
        for points, label, style in ((self.train, "train", "-"), (self.val, "validation", "o-")):
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.grid(alpha=0.3)
        axes.legend()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.val = list(state_dict["train"]), list(state_dict["val"])
