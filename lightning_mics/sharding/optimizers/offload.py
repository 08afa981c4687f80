"""Model states in host memory: what moves there, and what does not work with it.

::

    offload         on the device                       on the host
    False           weights, gradients, states
    "optimizer"     weights, gradients                  states; in a step copies of the other two
    True            one unsharded parameter group       weights, gradients, states

"States" are the optimizer's. In both cases the optimizer steps on the host, where its states are. With True, FSDP2
copies shards to the device to gather them, and reduced gradients back; sums that are pending until the boundary stay on
the device. On a CPU the host is the device: values, order and code are the same, and nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from lightning_mics._torch.host_memory import USABLE_SHARE, HostMemoryError
from lightning_mics._torch.streams import has_streams
from lightning_mics.sharding.options import CommunicationOptions

Offload = bool | Literal["optimizer"]


def checked_offload(offload: object) -> Offload:
    """The option, if it has a value that is allowed.

    Args:
        offload: Value of the option.

    Raises:
        ValueError: If it is none of True, False and ``"optimizer"``.
    """
    if isinstance(offload, bool):
        return offload
    if offload == "optimizer":
        return "optimizer"
    raise ValueError(f'offload={offload!r} is none of True, False and "optimizer"')


def check_offload(offload: Offload, *, communication: CommunicationOptions, gathered_dtype: torch.dtype | None) -> None:
    """Check that other options work with weights and gradients in host memory.

    Args:
        offload: The option.
        communication: Options of communication.
        gathered_dtype: Dtype of unsharded parameters; None is the dtype of the parameters.

    Raises:
        ValueError: If one does not.
    """
    if offload is not True:
        return
    if communication.inter_node_prefetch:
        raise ValueError(
            f"inter_node_prefetch={communication.inter_node_prefetch} sends shards ahead from the device, and with "
            'offload=True they are on the host; use inter_node_prefetch=0, or offload="optimizer"'
        )
    if gathered_dtype == torch.float16:
        raise ValueError(
            "offload=True has gradients on the host, where the loss scale of precision='16-mixed' is not; use "
            "'bf16-mixed', or offload=\"optimizer\""
        )


def offload_policy(offload: Offload, device: torch.device) -> OffloadPolicy:
    """FSDP2's policy for an option: pinned memory where the device copies by itself.

    Args:
        offload: The option.
        device: Device of this rank.
    """
    return CPUOffloadPolicy(pin_memory=has_streams(device)) if offload is True else OffloadPolicy()


@contextmanager
def shards_stay(model: nn.Module) -> Iterator[None]:
    """A context in which ``model.to(device)`` leaves the shards of its parameters where they are.

    Args:
        model: The sharded model.
    """
    apply: Any = model._apply
    vars(model)["_apply"] = lambda function, *args, **kwargs: apply(partial(_unless_shard, function), *args, **kwargs)
    try:
        yield
    finally:
        del vars(model)["_apply"]


def _unless_shard(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, DTensor) else function(tensor)


def check_host_memory(offload: Offload, *, rank_bytes: int, host_bytes: int, processes: int) -> None:
    """Check that the model states of the ranks of a host fit its memory.

    Args:
        offload: The option.
        rank_bytes: Model states of one rank in host memory, in bytes.
        host_bytes: Memory of the smallest host, in bytes.
        processes: Number of ranks on each host.

    Raises:
        HostMemoryError: If they do not.
    """
    needed, usable = processes * rank_bytes, int(USABLE_SHARE * host_bytes)
    if needed > usable:
        raise HostMemoryError(
            f"offload={offload!r}: model states of {processes} ranks take {_gib(needed)} of host memory, more than "
            f"{_gib(usable)}, {USABLE_SHARE:.0%} of what the smallest host has; use a larger partition_size, more "
            "nodes, or leave the option out"
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"


def reject_optimizer(name: str, options: Any, offload: Offload, *, why: str | None) -> None:
    """Raise for an optimizer whose step cannot run on shards in host memory.

    Args:
        name: Name of its class.
        options: Parameter groups of the optimizer.
        offload: The option.
        why: What it needs instead; None if it needs nothing.

    Raises:
        TypeError: If it needs something else.
        ValueError: If it is to be captured by a CUDA graph.
    """
    if why is not None:
        raise TypeError(
            f"{name} steps on {why}, and offload={offload!r} leaves each rank its shards in host memory; use an "
            "optimizer that steps on shards, such as torch.optim.AdamW, or leave offload out"
        )
    if any(group.get("capturable") for group in options):
        raise ValueError(
            f"{name}(capturable=True) is for steps in a CUDA graph, and offload={offload!r} steps on the host; leave "
            "capturable out"
        )
