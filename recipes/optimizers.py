"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import math

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


class AdamWWarmupCosine:
    """Makes AdamW that decays matrices only, its rate stepped once per optimizer step.

    The rate rises to ``lr`` over ``warmup_steps``, falls to ``final_lr_fraction * lr`` at ``total_steps`` and stays
    there, so that a finished run can be continued. A run that is shorter than its warm-up, as for a trial, ends in it.

    Raises:
        ValueError: If a value is out of its range; at once, while the model is still to be built.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int,
        total_steps: int,
        final_lr_fraction: float,
    ) -> None:
        for name, value, allowed, what in (
            ("lr", lr, lr > 0, "positive"),
            ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers from 0 to below 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("final_lr_fraction", final_lr_fraction, final_lr_fraction >= 0, "at least 0"),
        ):
            if not allowed:
                raise ValueError(f"optimizer.{name}={value} must be {what}")
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_lr_fraction = final_lr_fraction

    def __call__(self, module: nn.Module) -> OptimizerLRSchedulerConfig:
        """The optimizer and the schedule of ``module``, as ``configure_optimizers`` returns them."""
        groups = _decayed_or_not(module, weight_decay=self.weight_decay)
        optimizer = AdamW(groups, lr=self.lr, betas=tuple(self.betas), fused=True)
        schedule = LambdaLR(optimizer, self.fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fraction(self, step: int) -> float:
        """The share of ``lr`` that ``step`` takes, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def _decayed_or_not(module: nn.Module, *, weight_decay: float) -> list[dict]:
    """Two parameter groups: what multiplies activations is decayed, and nothing else.

    Shrinking biases and norms regularizes nothing, and an embedding would shrink most where a token is rare. One that
    is tied to the output head multiplies activations there.
    """
    decayed = {
        parameter
        for owner in module.modules()
        if not isinstance(owner, nn.Embedding)
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim >= 2 and "bias" not in name  # experts have biases in two dimensions
    }
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p not in decayed], "weight_decay": 0.0},
    ]
