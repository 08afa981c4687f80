"""Private names of FSDP2's reductions: where parameters are in them, and what gradients are divided by afterwards."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import _get_gradient_divide_factors
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

from lightning_mics._torch.fsdp import _param_groups, has_inner_tensors
from lightning_mics._torch.parameter_hooks import users_hook

PACKAGE = "lightning_mics."  # whose own hooks do not mind where rows are


def reduced_segments(module: FSDPModule, with_gradient: int) -> list[tuple[int, int, int]]:
    """Where parameters are in the result of a reduce-scatter of ``module`` itself: position, begin and end of each.

    Args:
        module: FSDP module.
        with_gradient: The parameters that take part, as bits in their order.
    """
    segments, at = [], 0
    for index, parameter in enumerate(p for group in _param_groups(module) for p in group.fsdp_params):
        if with_gradient >> index & 1:
            size = parameter.padded_sharded_param_size.numel()
            segments.append((index, at, at + size))
            at += size
    return segments


def may_be_owned(module: FSDPModule, index: int) -> bool:
    """Whether no hook of users looks at the gradient of a parameter of ``module`` itself before its backward has ended.

    Args:
        module: FSDP module.
        index: Position of the parameter.
    """
    parameters = [p for group in _param_groups(module) for p in group.fsdp_params]
    hooks = getattr(parameters[index].sharded_param, "_post_accumulate_grad_hooks", None) or {}
    return all(users_hook(hook).__module__.startswith(PACKAGE) for hook in hooks.values())


def is_row_sharded_matrix(module: FSDPModule, index: int) -> bool:
    """Whether a parameter of ``module`` itself is a matrix of which each rank has some rows, on its device.

    Args:
        module: FSDP module.
        index: Position of the parameter.
    """
    groups = list(_param_groups(module))
    parameter = [p for group in groups for p in group.fsdp_params][index]
    return (
        len(groups) == 1
        and not has_inner_tensors(parameter._sharded_local_tensor)
        and parameter.sharded_param.dim() == 2
        and parameter.fsdp_placement.dim == 0
        and not parameter.offload_to_cpu
    )


def divided_afterwards(module: FSDPModule, dtype: torch.dtype) -> float:
    """The number that FSDP2 divides gradients of ``module`` itself by once they are reduced; 1 for most dtypes.

    Args:
        module: FSDP module.
        dtype: Dtype in which gradients are reduced.
    """
    for group in _param_groups(module):
        _, after, _, _ = _get_gradient_divide_factors(
            group._reduce_scatter_process_group if isinstance(group.mesh_info, FSDPMeshInfo) else None,
            None,  # the reduction over replicas is a hook: see `replace_all_reduce`
            dtype,
            group.device.type,
            group.gradient_divide_factor,
            group.force_sum_reduction_for_comms,
        )
        return after or 1.0
    return 1.0
