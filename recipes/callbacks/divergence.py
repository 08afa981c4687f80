"""Stopping a diverged run, on all ranks together and before a diverged checkpoint is saved."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from recipes.callbacks.log_steps import at_log_step

NEVER = torch.iinfo(torch.int64).max


class DivergedError(RuntimeError):
    """The loss or the weights became NaN or infinite."""


class StopIfDiverged(L.Callback):
    """Stops a run once its loss is not finite; no checkpoint is saved from then on.

    Each rank checks the loss of each micro-step on its device, without synchronization. The results are reduced over
    ranks every ``log_every_n_steps``, before a validation and before a checkpoint: all ranks raise the same error.

    Weights are checked before a checkpoint, because gradients may overflow where the loss does not. Lightning calls
    callbacks before it saves complete checkpoints only: those with ``save_weights_only`` are not checked.
    """

    def __init__(self) -> None:
        self._first_seen: Tensor | None = None  # see `_when`
        self._last_good = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_seen = torch.tensor(NEVER, device=trainer.strategy.root_device)
        self._last_good = _last_checkpoint(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step = trainer.global_step + 1
        self._last_good = _last_checkpoint(trainer)  # not later: it is named before it is saved

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        now = _when(self._step, trainer.global_rank, ranks=trainer.world_size)
        seen = torch.where(torch.isfinite(outputs["loss"]), NEVER, now)
        self._first_seen = torch.minimum(self._first_seen, seen)
        if at_log_step(trainer):
            self._check_losses(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")  # mean over all ranks
        if trainer.state.fn == "fit" and loss is not None and not torch.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss.item()} after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_losses(trainer)
        finite = torch.stack([torch.isfinite(_own_part(parameter)).all() for parameter in pl_module.parameters()]).all()
        if not trainer.strategy.reduce(finite.long(), reduce_op="min"):
            raise self._diverged(f"weights are not finite after step {trainer.global_step}")

    def _check_losses(self, trainer: L.Trainer) -> None:
        if self._first_seen is None:  # a validation before training
            return
        first = int(trainer.strategy.reduce(self._first_seen.clone(), reduce_op="min"))
        if first != NEVER:
            step, rank = divmod(first, trainer.world_size)
            raise self._diverged(f"the training loss of rank {rank} is not finite in step {step}")

    def _diverged(self, what: str) -> DivergedError:
        if not self._last_good:
            return DivergedError(
                f"training has diverged: {what}; no checkpoint is saved yet, start again with a lower optimizer.lr"
            )
        return DivergedError(
            f"training has diverged: {what}; the last good checkpoint is {self._last_good}. Resume it by "
            f"resume={self._last_good} and a smaller trainer.gradient_clip_val, or start again with a lower "
            "optimizer.lr; a resumed run ignores it, because its schedule comes from the checkpoint"
        )


def _when(step: int, rank: int, *, ranks: int) -> int:
    """Encode step and rank in one number that orders by step, then by rank."""
    return step * ranks + rank


def _own_part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _last_checkpoint(trainer: L.Trainer) -> str:
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((path for saver in savers for path in (saver.last_model_path, saver.best_model_path) if path), "")
