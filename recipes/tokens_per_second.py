"""Throughput of training over all ranks."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from torch import Tensor


class TokensPerSecond(L.Callback):
    """Logs ``tokens_per_s``: tokens that all ranks trained on since the last validation, per second since then."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._tokens += batch[:, 1:].numel() * trainer.world_size
        pl_module.log("tokens_per_s", self._tokens / (time.perf_counter() - self._since), prog_bar=True)

    def _restart(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
