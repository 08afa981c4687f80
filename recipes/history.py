"""What a run has measured, by optimizer step; saved with checkpoints, so that it begins where the first run began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

UNITS = {
    "train_loss": "nats per token",
    "val_loss": "nats per token",
    "val_masked_accuracy": "share of masked tokens",
    "tokens_per_s": "tokens per second",
    "mfu_tflops_per_gpu": "TFLOPS per rank",
    "hfu_tflops_per_gpu": "TFLOPS per rank",
    "memory_gib": "GiB, rank 0",
    "grad_norm": "norm before clipping",
    "lr": "learning rate",
}

Series = dict[str, list[tuple[int, float]]]  # by name: (step, value)


class History(L.Callback):
    """Notes metrics over optimizer steps and draws the losses into ``path``, anew at every validation.

    Args:
        path: Of the picture; its ending says the format.
        every_n_steps: How often to note. The training loss is the mean of rank 0's micro-steps since the last time.
    """

    def __init__(self, *, path: str, every_n_steps: int) -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.series: Series = {}
        self._recent: list[Any] = []  # losses as tensors: reading their value would make a GPU wait

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._recent.append(trainer.callback_metrics["train_loss"])
        if len(self._recent) < self.every_n_steps * trainer.accumulate_grad_batches:
            return
        step, metrics = trainer.global_step, trainer.callback_metrics
        self.note("train_loss", step, sum(loss.item() for loss in self._recent) / len(self._recent))
        self.note("lr", step, trainer.optimizers[0].param_groups[0]["lr"])
        self._recent.clear()
        for name in UNITS.keys() & metrics.keys():
            if not name.startswith(("train_", "val_")):
                self.note(name, step, metrics[name].item())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for name in UNITS.keys() & trainer.callback_metrics.keys():
            if name.startswith("val_"):
                self.note(name, trainer.global_step, trainer.callback_metrics[name].item())
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draw(self.series, [["train_loss", "val_loss"]]).savefig(self.path, dpi=120)

    def note(self, name: str, step: int, value: float) -> None:
        """Add a point."""
        self.series.setdefault(name, []).append((step, value))

    def state_dict(self) -> dict[str, Any]:
        return {"series": self.series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {name: list(points) for name, points in state_dict["series"].items()}


def draw(series: Series, panels: list[list[str]]) -> Any:
    """A figure with one panel for each list of names that has points.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure  # not pyplot, which picks a display; imported late, for it is slow

    panels = [there for names in panels if (there := [name for name in names if series.get(name)])]
    columns = min(2, len(panels))
    rows = -(-len(panels) // max(1, columns))
    figure = Figure(figsize=(7 if columns == 1 else 10, 4 if rows == 1 else 2.8 * rows), layout="constrained")
    for index, names in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1, xlabel="optimizer step", ylabel=UNITS[names[0]])
        for name in names:
            style = "o-" if name.startswith("val_") else "-"
            axes.plot(*zip(*series[name], strict=True), style, label=name, markersize=4)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
