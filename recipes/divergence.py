"""The size of the gradients; and the end of a run that has diverged, before it spoils a checkpoint."""

from __future__ import annotations

import math

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class DivergedError(RuntimeError):
    """The loss or its gradients became NaN or infinite."""


class GradientNorm(L.Callback):
    """Logs ``grad_norm``, of all parameters before clipping, and stops a run whose loss or gradients are not finite.

    Gradients are of all ranks together, so every rank finds the same and all stop in the same step. They are looked at
    every ``log_every_n_steps``, and the loss before each checkpoint that a validation brings: a model with NaN in it
    has no other loss.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        norm = gradient_norm(pl_module)
        pl_module.log("grad_norm", norm)
        if not math.isfinite(norm):
            raise DivergedError(_message(trainer, "the gradients are", step=trainer.global_step + 1))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn == "fit" and loss is not None and not math.isfinite(loss):
            raise DivergedError(_message(trainer, f"the validation loss is {float(loss)},", step=trainer.global_step))


def gradient_norm(module: torch.nn.Module) -> float:
    """The 2-norm of all gradients of ``module``, whose parameters may be sharded; every rank calls it."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _message(trainer: L.Trainer, what: str, *, step: int) -> str:
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    saved = [path for saver in savers for path in (saver.last_model_path, saver.best_model_path)]
    last = next((path for path in saved if path), None)
    way_on = (
        f"the last good checkpoint is {last}: go on from it (resume={last})" if last else "nothing is saved yet: begin"
    )
    return f"training has diverged: {what} not finite in step {step}; {way_on} with a lower optimizer.lr"
