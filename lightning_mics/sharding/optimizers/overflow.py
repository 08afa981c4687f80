"""Loss scaling of sharded gradients: all ranks find an overflow together, once per step of an optimizer.

In float16 small gradients vanish, so the loss is multiplied by a scale and gradients are divided by it before the step.
Where the scale is too large, gradients overflow: the step is skipped and the scale halved. Each rank sees its shard
only, so ranks have to agree, or some would step and the weights of others would not fit theirs::

    boundary    hop 1, hop 2    scaled gradients are reduced and accumulated in float32
    step        unscale         each rank divides its shard, and finds whether it holds inf or nan
                agree           maximum of that over all ranks: 4 bytes, on the device
                clip, step      by unscaled gradients; or skipped by all ranks

Replicas have the same sums after hop 2, ranks of a partition group have different ones. The maximum is over all ranks
nevertheless: what a hook of the user has done to the gradients of one rank must not part the replicas.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from lightning_mics._torch.optimizers.grad_scaler import ShardedGradScaler, agree_on_overflows
from lightning_mics.collectives.control_plane import control_plane

SCALER_KEY = "MixedPrecision"  # of a scaler's state in checkpoints: where Lightning's Trainer has it


def check_optimizer(optimizer: Optimizer, precision: object) -> None:
    """Check that an optimizer can train in ``precision``.

    Args:
        optimizer: Optimizer of the job.
        precision: Lightning's name of the precision.

    Raises:
        ValueError: If it is LBFGS in ``"16-mixed"``.
    """
    if precision == "16-mixed" and isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS runs several backwards in one step, whose overflows could not be skipped, so it does not train with "
            "precision='16-mixed'; use 'bf16-mixed' or '32-true', or another optimizer"
        )


def scale_with_all_ranks(scaler: GradScaler) -> None:
    """Let a gradient scaler skip the steps of sharded optimizers on all ranks or on none.

    Args:
        scaler: The scaler, changed in place.
    """
    agree_on_overflows(scaler, find_overflow)


def skipped_steps(scaler: GradScaler | None) -> int:
    """Number of optimizer steps that were skipped for an overflow; 0 without a scaler. Waits for the device.

    Args:
        scaler: The scaler of a precision.
    """
    return int(scaler.skipped) if isinstance(scaler, ShardedGradScaler) else 0


def scale_and_skipped(scaler: GradScaler | None) -> tuple[Tensor, Tensor] | None:
    """The scale and the number of skipped steps, [] each and in float32, without waiting for the device.

    Args:
        scaler: The scaler of a precision.

    Returns:
        None where no loss is scaled.
    """
    if not isinstance(scaler, ShardedGradScaler) or not scaler.is_enabled():
        return None
    scale, skipped = (torch.as_tensor(value, dtype=torch.float32) for value in (scaler.current_scale, scaler.skipped))
    return scale, skipped


def find_overflow(found_inf: Tensor) -> None:
    """Replace what this rank has found by what any rank has; every rank calls it. Does not wait for the device.

    Args:
        found_inf: Whether a gradient of this rank is inf or nan, 0 or 1: [].
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        control_plane().agree("looks for an overflow of gradients")
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
