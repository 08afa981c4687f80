"""What holds for a job under Lightning, be it the Trainer's or Fabric's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


def check_precision(precision: object) -> None:
    """Refuse what has no place in sharded training, by Lightning's name of it.

    Raises:
        ValueError: If it is none of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"strategy 'mics' does not support precision={str(precision)!r}; "
            f"use one of {', '.join(map(repr, PRECISIONS))}"
        )


def check_job(device: torch.device, *, backend: str) -> None:
    """Refuse a device that has no collectives, and a backend that does not serve it.

    Raises:
        ValueError: The same on every rank, before any rank waits for another.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"strategy 'mics' runs on CUDA and CPU devices, not on {device.type!r}")
    if device.type == "cpu" and "gloo" not in backend:
        raise ValueError(f"process_group_backend={backend!r} cannot serve CPU devices; use 'gloo' or None")


def check_saving(*, save_sharded: bool, async_save: bool) -> None:
    """Refuse full files beside training.

    Raises:
        ValueError: If both are asked for.
    """
    if async_save and not save_sharded:
        raise ValueError("async_save=True needs save_sharded=True: a full file is gathered while training waits")


def reduce_in_place(tensor: Any, *, group: Any, op: Any) -> Any:
    """Reduce as Lightning's own does, but without a barrier of all ranks before each value.

    Args:
        tensor: What is no tensor is returned as it is.
        group: None is all ranks.
        op: A ``ReduceOp`` or its name; "mean" and "avg" divide by the number of ranks, and None sums.
    """
    if not isinstance(tensor, Tensor) or not dist.is_initialized():
        return tensor
    mean = isinstance(op, str) and op.lower() in ("mean", "avg")
    named = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) and not mean else op
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if mean or op is None else named, group=group)
    return tensor.copy_(tensor / dist.get_world_size(group)) if mean else tensor
