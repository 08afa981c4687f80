"""A progress bar that counts optimizer steps of the whole run, and one lasting line per validation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {"train_loss": ".3f", "val_loss": ".3f", "val_masked_accuracy": ".3f", "tokens_per_s": ",.0f", "lr": ".2e"}


class StepProgressBar(ProgressBar):
    """Lightning's own bars count micro-steps against ``max_steps``, so under accumulation they run past their end.

    Where the output is no terminal, as in the log file of a job, there is a line now and then instead of a bar.

    Args:
        refresh_rate: Steps between two looks at the metrics.
        line_every_n_steps: Steps between two lines where there is no terminal.
        console: Where to write; None is the standard output.
    """

    def __init__(self, *, refresh_rate: int, line_every_n_steps: int, console: Console | None = None) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self.line_every_n_steps = line_every_n_steps
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._shown = True
        self._bar: Progress | None = None
        self._step = 0

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._shown:
            self.console.print(*args, markup=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if self._shown and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"))
            self._bar = Progress(TextColumn("step"), *columns, console=self.console)
            self._bar.add_task("step", total=trainer.max_steps, completed=self._step, metrics="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._bar is not None and self._step % self.refresh_rate == 0:
            self._bar.update(self._bar.task_ids[0], completed=self._step, metrics=self.metrics(trainer))
        elif self._bar is None and self._step % self.line_every_n_steps == 0:
            self.print(f"step {self._step}/{trainer.max_steps}  {self.metrics(trainer)}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.print(f"step {trainer.global_step}/{trainer.max_steps}  {self.metrics(trainer)}")

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def metrics(self, trainer: L.Trainer) -> str:
        """What is shown of the metrics, in one line."""
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name in SHOWN}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        return "  ".join(f"{name} {values[name]:{form}}" for name, form in SHOWN.items() if name in values)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
