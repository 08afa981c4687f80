"""A callback that reports the loss scale of ``"16-mixed"``, and how many steps were skipped for an overflow."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_mics.sharding.optimizers.overflow import scale_and_skipped


class LossScaleMonitor(pl.Callback):
    """Logs ``loss_scale`` and ``skipped_steps`` with each optimizer step; in other precisions than 16-mixed nothing.

    ``skipped_steps`` counts since the beginning of training, also over checkpoints. A few skipped steps at the
    beginning, and one now and then, are what dynamic loss scaling does; many in a row mean that gradients are not
    finite at any scale. Values stay on the device until Lightning logs them, every ``log_every_n_steps``.
    """

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        values = scale_and_skipped(getattr(trainer.precision_plugin, "scaler", None))
        if values is not None and not trainer.fit_loop.epoch_loop._should_accumulate():
            pl_module.log_dict(dict(zip(("loss_scale", "skipped_steps"), values, strict=True)))
