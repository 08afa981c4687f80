"""A progress bar that counts optimizer steps of the whole run, and one lasting line per validation."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm


class StepProgressBar(TQDMProgressBar):
    """Lightning's own bar counts micro-steps against ``max_steps``, so under accumulation it runs past its end."""

    def init_validation_tqdm(self) -> Any:
        return tqdm(disable=True)

    def init_predict_tqdm(self) -> Any:
        return tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_start()
        self.train_progress_bar.reset(total=trainer.max_steps)
        # what was done before a resume does not count for the rate
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("step")

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar goes on: it counts steps of the run."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step != self.train_progress_bar.n and trainer.global_step % self.refresh_rate == 0:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self._show_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            values = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            self.print(f"step {trainer.global_step}  {values}")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        metrics = trainer.progress_bar_metrics.items()
        return {name: f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.3f}" for name, value in metrics}

    def _show_step(self, trainer: L.Trainer) -> None:
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()
