"""The size of the gradients, which often tells of trouble before the loss does."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from recipes.callbacks.log_steps import is_log_step


class GradientNorm(L.Callback):
    """Logs ``grad_norm``, of all parameters together before clipping, every ``log_every_n_steps``.

    Lightning's ``grad_norm`` takes one norm per parameter, each of them a collective where parameters are sharded.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if is_log_step(trainer, trainer.global_step + 1):
            pl_module.log("grad_norm", gradient_norm(pl_module))


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """The 2-norm of all gradients of ``module``, as clipping takes it; every rank calls it if parameters are sharded.

    Returns:
        A scalar on the device of the gradients: nothing waits for its value.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
