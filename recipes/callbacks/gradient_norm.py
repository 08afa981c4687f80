"""The norm of the gradients, which often shows instability before the loss does."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from recipes.callbacks.log_steps import is_log_step


class GradientNorm(L.Callback):
    """Logs ``grad_norm``, the norm of all gradients before clipping, every ``log_every_n_steps``.

    Lightning's ``grad_norm`` computes one norm per parameter, which costs a collective for each sharded parameter.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if is_log_step(trainer, trainer.global_step + 1):
            pl_module.log("grad_norm", gradient_norm(pl_module))


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """The 2-norm of all gradients of ``module``, as for clipping; every rank calls it if parameters are sharded.

    Returns:
        Scalar on the device of the gradients, without synchronization.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
