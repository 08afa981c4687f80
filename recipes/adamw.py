"""AdamW with warm-up and cosine decay, as ``configure_optimizers`` returns it."""

from __future__ import annotations

import math

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw_warmup_cosine(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    final_lr_fraction: float,
) -> OptimizerLRSchedulerConfig:
    """AdamW that decays matrices only, its rate stepped once per optimizer step.

    The rate rises to ``lr`` over ``warmup_steps``, falls to ``final_lr_fraction * lr`` at ``total_steps`` and stays
    there, so that a finished run can be continued.
    """
    optimizer = AdamW(_decay_matrices(module, weight_decay=weight_decay), lr=lr, betas=tuple(betas), fused=True)

    def fraction(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_lr_fraction + (1 - final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, fraction), "interval": "step"}}


def _decay_matrices(module: nn.Module, *, weight_decay: float) -> list[dict]:
    """Two parameter groups: biases and norms are not decayed, for shrinking them regularises nothing."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
