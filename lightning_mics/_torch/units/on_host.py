"""Shards and gradients of a module itself that FSDP2 has in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import _param_groups

COPIES_IN = "fsdp::all_gather_copy_in"  # operation of FSDP2 whose first argument are the shards, on the device


def shards_on_host(module: FSDPModule) -> list[Tensor]:
    """Memory of the shards of ``module`` itself that are in host memory, each [own]."""
    return [p._sharded_param_data for group in _param_groups(module) for p in group.fsdp_params if p.offload_to_cpu]


def copy_gradients(module: FSDPModule, copy: Callable[[Tensor], Tensor]) -> None:
    """Have ``copy`` make the gradients of ``module`` itself that go to the host; on a CPU FSDP2 copies none.

    Args:
        module: FSDP module.
        copy: Function that copies a reduced gradient: [own] -> [own].
    """
    for parameter in (p for group in _param_groups(module) for p in group.fsdp_params if p.offload_to_cpu):

        def to_sharded(tensor: Tensor, make: Any = parameter.to_sharded_dtensor) -> Any:
            return make(copy(tensor))

        parameter.to_sharded_dtensor = to_sharded  # type: ignore[method-assign]
