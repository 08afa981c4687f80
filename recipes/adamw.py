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
    there, so that a finished run can be continued. A run that is shorter than its warm-up, as for a trial, ends in it.

    Raises:
        ValueError: If ``lr`` is not positive or ``warmup_steps`` is negative.
    """
    if lr <= 0:
        raise ValueError(f"optimizer.lr={lr} must be positive")
    if warmup_steps < 0:
        raise ValueError(f"optimizer.warmup_steps={warmup_steps} must not be negative")
    optimizer = AdamW(_decayed_or_not(module, weight_decay=weight_decay), lr=lr, betas=tuple(betas), fused=True)

    def fraction(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_lr_fraction + (1 - final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, fraction), "interval": "step"}}


def _decayed_or_not(module: nn.Module, *, weight_decay: float) -> list[dict]:
    """Two parameter groups: what multiplies activations is decayed, and nothing else.

    Shrinking biases and norms regularises nothing, and an embedding would shrink most where a token is rare. One that
    is tied to the output head multiplies activations there.
    """
    decayed = {
        parameter
        for owner in module.modules()
        if not (isinstance(owner, nn.Embedding) or "Norm" in type(owner).__name__)
        for name, parameter in owner.named_parameters(recurse=False)
        if "bias" not in name
    }
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p not in decayed], "weight_decay": 0.0},
    ]
