"""What FSDP2 copies into the input of the all-gather of a module itself, for a copy ahead of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from lightning_mics._torch.fsdp import _param_groups


@dataclass(frozen=True)
class GatherInputs:
    """The shards that FSDP2 gathers for one module itself, side by side.

    Attributes:
        shards: The shard of each parameter: [any].
        dtype: Dtype in which they are gathered.
    """

    shards: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements of all shards."""
        return sum(shard.numel() for shard in self.shards)

    @torch.no_grad()
    def copy_to(self, memory: Tensor) -> None:
        """Copy the shards side by side into ``memory``, [elements]: what FSDP2 copies into its own input, bit for bit.

        Args:
            memory: Memory of the dtype in which they are gathered: [elements].
        """
        torch._foreach_copy_(list(torch.split(memory, [shard.numel() for shard in self.shards])), list(self.shards))


def gather_inputs(module: FSDPModule) -> GatherInputs | None:
    """The shards of ``module`` itself; None if FSDP2 does not gather them as they are, in one dtype.

    Args:
        module: FSDP module, which has been gathered before.
    """
    groups = list(_param_groups(module))
    if len(groups) != 1:
        return None
    parameters = groups[0].fsdp_params
    dtypes = {parameter.param_dtype or parameter._sharded_param_data.dtype for parameter in parameters}
    as_they_are = all(
        parameter.sharded_state != ShardedState.SHARDED_POST_FORWARD
        and not parameter.offload_to_cpu
        and not hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather")
        for parameter in parameters
    )
    if len(dtypes) != 1 or not as_they_are:
        return None
    return GatherInputs(tuple(parameter._sharded_param_data for parameter in parameters), dtypes.pop())


def gathered_segments(module: FSDPModule, shard: Tensor) -> list[tuple[int, int]] | None:
    """Where each parameter of ``module`` itself is in what FSDP2 gathers: begins and ends.

    Args:
        module: FSDP module.
        shard: The shards of all parameters, side by side, in one dtype or as bytes: [shard].

    Returns:
        Positions in ``shard``, in the order of the parameters; None if they are not side by side there.
    """
    groups = list(_param_groups(module))
    if len(groups) != 1 or any(hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in groups[0].fsdp_params):
        return None
    segments, at = [], 0
    for parameter in groups[0].fsdp_params:
        dtype = parameter.param_dtype or parameter._sharded_param_data.dtype
        size_bytes = parameter._sharded_param_data.numel() * dtype.itemsize
        segments.append((at, at + size_bytes // shard.element_size()))
        at = segments[-1][1]
    return segments if at == shard.numel() else None
