"""A progress bar over all optimizer steps of a run, and a line for each validation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

IN_TRAINING = {"train_loss": ".3f", "tokens_per_s": ",.0f", "lr": ".2e"}


AFTER_VALIDATION = {"train_loss": ".3f", "val_loss": ".3f", "val_masked_accuracy": ".3f"}


class StepProgressBar(ProgressBar):
    """A bar over optimizer steps, and a permanent line for each validation.

    Without a terminal, as in the log file of a job, it prints a line every few steps instead of a bar. Lightning's
    ``RichProgressBar`` counts micro-steps against ``max_steps``, so that with accumulation it runs past its end,
    restarts in each epoch, and has no lines: a subclass would replace each of its hooks.

    Args:
        refresh_rate: Steps between two updates of the metrics.
        line_every_n_steps: Steps between two lines without a terminal.
        console: Console to write to; None is the standard output.
    """

    def __init__(self, *, refresh_rate: int, line_every_n_steps: int, console: Console | None = None) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self.line_every_n_steps = line_every_n_steps
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._shown = True
        self._bar: Progress | None = None
        self._step = 0

    @property
    def is_enabled(self) -> bool:
        """Whether bars are shown. The strategy reads this for its own bars, of checkpoints that take long."""
        return self._shown and self.console.is_terminal

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._shown:
            self.console.print(*args, markup=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if self.is_enabled:
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            self._bar = Progress(TextColumn("step"), *columns, console=self.console)
            self._bar.add_task("step", total=trainer.max_steps, completed=self._step, metrics="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._bar is not None and self._step % self.refresh_rate == 0:
            self._advance(trainer)
        elif self._bar is None and self._step % self.line_every_n_steps == 0:
            self._print_line(trainer, IN_TRAINING)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._print_line(trainer, AFTER_VALIDATION)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._advance(trainer)
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _advance(self, trainer: L.Trainer) -> None:
        self._bar.update(self._bar.task_ids[0], completed=self._step, metrics=_metrics(trainer, IN_TRAINING))

    def _print_line(self, trainer: L.Trainer, shown: dict[str, str]) -> None:
        if self._shown:
            self.print(f"step {trainer.global_step}/{trainer.max_steps}  {_metrics(trainer, shown)}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _metrics(trainer: L.Trainer, shown: dict[str, str]) -> str:
    """One line of the metrics in ``shown``, which maps names to formats."""
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name in shown}
    values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    return "  ".join(f"{name} {values[name]:{form}}" for name, form in shown.items() if name in values)
