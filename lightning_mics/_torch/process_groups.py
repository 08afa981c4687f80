"""Process groups and their collectives: private names of torch, and what differs between its versions."""

from __future__ import annotations

import atexit
import re
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug

HAS_UNSORTED_GROUPS = hasattr(dist, "all_gather_single")  # `sort_ranks` came with it, in 2.13


all_gather_single = dist.all_gather_single if HAS_UNSORTED_GROUPS else dist.all_gather_into_tensor


reduce_scatter_single = dist.reduce_scatter_single if HAS_UNSORTED_GROUPS else dist.reduce_scatter_tensor


def check_order(ranks: tuple[int, ...]) -> None:
    """Check that torch supports a process group in this order.

    Raises:
        RuntimeError: If the order is not ascending and torch is older than 2.13, whose groups are always sorted.
    """
    if list(ranks) != sorted(ranks) and not HAS_UNSORTED_GROUPS:
        raise RuntimeError(
            f"a partition group that spans nodes of several ranks needs torch >= 2.13, this is torch "
            f"{torch.__version__}: upgrade torch, or use a partition_size that stays inside one node"
        )


def new_group(ranks: tuple[int, ...], *, name: str, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make the process group of ``ranks`` in the given order; only its members need to call.

    Args:
        ranks: Members, in the order of the group.
        name: Name of the group in torch's messages.
        timeout: Longest time of its collectives; None is the backend's default.

    Raises:
        RuntimeError: If this torch does not support the order.
    """
    check_order(ranks)
    order: dict[str, Any] = {"sort_ranks": False} if list(ranks) != sorted(ranks) else {}
    group = dist.new_group(
        list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"mics {name}", **order
    )
    assert isinstance(group, dist.ProcessGroup)  # the caller is a member
    return group


def groups_made() -> int:
    """Number of process groups that this rank has made: torch derives their names from it, on each member by itself."""
    return len(dist.distributed_c10d._world.pg_names)


def backends_of_devices() -> dict[str, str]:
    """Name of the default process group's backend for each device type, as in ``{"cpu": "gloo", "cuda": "nccl"}``."""
    entries = str(dist.get_backend_config()).split(",")  # as in "cpu:gloo,cuda:nccl"
    return dict(entry.split(":") for entry in entries)


def premultiplied_sum_factor(op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> float | None:
    """The factor of a pre-multiplied sum, or None for any other reduction."""
    if op != dist.ReduceOp.PREMUL_SUM:
        return None
    state: Any = op.__getstate__()  # (kind, factor); the factor has no public getter
    return float(state[1])


def was_left_waiting(error: RuntimeError) -> bool:
    """Whether a collective has failed because another rank did not take part; gloo says so in words only."""
    return isinstance(error, dist.DistError) or bool(
        re.search("Timed out waiting|[Cc]onnection (closed|reset) by peer", str(error))
    )


def let_gloo_finish(device: torch.device) -> None:
    """Have the interpreter wait a moment at its exit, on CPUs.

    Gloo's threads let go of the tensors of the last collective a moment after it. Where the interpreter is gone by
    then the process aborts (https://github.com/pytorch/pytorch/pull/179291), and a job that is done looks failed.

    Args:
        device: The device of this rank.
    """
    if device.type == "cpu":
        atexit.unregister(_wait)
        atexit.register(_wait)


def _wait() -> None:
    time.sleep(0.2)
