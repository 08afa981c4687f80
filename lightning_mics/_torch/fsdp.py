"""Private names of FSDP2, and what differs between its versions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule

# FSDP2's communication interface has no public path yet (https://github.com/pytorch/pytorch/pull/155189).
from torch.distributed.fsdp._fully_shard import _fsdp_api
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

__all__ = [
    "OptimizedModule",
]


class _OrdinaryBuffers:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_OrdinaryBuffers, _fsdp_api.AllGather):
    """What FSDP2 calls to gather parameters, with ordinary buffers."""


class ReduceScatter(_OrdinaryBuffers, _fsdp_api.ReduceScatter):
    """What FSDP2 calls to reduce gradients, with ordinary buffers."""


def unsharded_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The parameters of ``module`` itself as they are gathered, of which only shapes are sure to be there."""
    return [
        p._unsharded_param
        for group in _param_groups(module)
        for p in group.fsdp_params
        if p.sharded_param.requires_grad
    ]


def partial_sums(module: FSDPModule) -> list[Tensor]:
    """What ``module`` itself keeps of gradients that wait for the second hop."""
    return [g._partial_reduce_output for g in _param_groups(module) if g._partial_reduce_output is not None]


def has_pending_gradients(module: FSDPModule) -> bool:
    """Whether ``module`` itself holds gradients that still wait for their reduction, whole or as sums of shards."""
    return any(
        group._partial_reduce_output is not None or any(map(_has_unreduced_gradient, group.fsdp_params))
        for group in _param_groups(module)
    )


def trainable(module: FSDPModule) -> list[bool]:
    """Whether each parameter that ``module`` itself shards requires gradients, be it gathered or not."""
    return [p.sharded_param.requires_grad for group in _param_groups(module) for p in group.fsdp_params]


def sharded_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The sharded parameters of ``module`` itself, also while they are gathered."""
    return [p.sharded_param for group in _param_groups(module) for p in group.fsdp_params]


def weights_version(module: FSDPModule) -> Hashable:
    """What differs after a change of the sharded parameters of ``module`` itself, if torch knows of the change.

    It does not know of changes through ``.data``, by ``torch._foreach_*`` functions, and of memory.
    """
    return tuple(_version(p) for group in _param_groups(module) for p in group.fsdp_params)


def _version(parameter: Any) -> Hashable:
    shard = parameter.sharded_param
    return shard._version, shard._local_tensor._version, parameter._sharded_param_data.untyped_storage()._cdata


def _has_unreduced_gradient(parameter: Any) -> bool:
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)


def take_over_second_hop(module: FSDPModule, reduce: Callable[[Tensor, Any], None]) -> None:
    """Let ``reduce(shard, op)`` run after every reduce-scatter of ``module`` itself, in place of FSDP2's all-reduce.

    FSDP2's all-reduce cannot be replaced, only followed by a hook. It runs where a parameter group's mesh has an axis
    of replicas; without one the hook is all there is. Parameters keep the whole mesh.
    """
    for group in _param_groups(module):
        mesh_info = FSDPMeshInfo(mesh=group.mesh_info.mesh, shard_mesh_dim=group.mesh_info.shard_mesh_dim)
        group.mesh_info = mesh_info
        if group.post_forward_mesh_info is not None:
            group.post_forward_mesh_info = mesh_info

    def hook(shard: Tensor) -> None:
        whole_factor = any(group.gradient_divide_factor is not None for group in _param_groups(module))
        reduce(shard, dist.ReduceOp.SUM if whole_factor else dist.ReduceOp.AVG)

    module.set_all_reduce_hook(hook)


class GatheredParameters:
    """The parameters of one module itself, which stay in memory as gathered while the module shows their shards.

    FSDP2 gathers at each use and frees after it.

    Args:
        module: Sharded by FSDP2.
        reuse: Called before each use with ``in_forward``; whether what is there can be used once more.
        made: Called when they are gathered instead.
    """

    def __init__(self, module: FSDPModule, *, reuse: Callable[..., bool], made: Callable[[], None]) -> None:
        self._groups = list(_param_groups(module))
        self._reuse = reuse
        self._made = made
        self._kept: set[FSDPParamGroup] = set()
        for group in self._groups:
            group.unshard = partial(self._unshard, group)  # type: ignore[method-assign]
            for parameter in group.fsdp_params:
                free = partial(self._free_unless_kept, group, parameter)
                parameter.free_unsharded_param = free  # type: ignore[method-assign]

    def free(self) -> None:
        """Free them now, or when their use ends."""
        self._kept.clear()
        for group in self._groups:
            if group.is_sharded:
                for parameter in group.fsdp_params:
                    parameter.free_unsharded_param()

    def whole(self) -> list[Tensor]:
        """The memory of each: [ranks * shard]."""
        return [
            out for group in self._groups for parameter in group.fsdp_params for out in parameter.all_gather_outputs
        ]

    def own_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of each gathered parameter, and the shard that it was gathered from: [shard], both."""
        for group in self._groups:
            mesh_info: Any = group.mesh_info
            position = mesh_info.shard_mesh_rank
            for parameter in group.fsdp_params:
                for gathered, shard in zip(parameter.all_gather_outputs, parameter.all_gather_inputs, strict=True):
                    yield gathered.narrow(0, position * shard.numel(), shard.numel()), shard

    def _unshard(self, group: FSDPParamGroup, async_op: bool = False) -> None:
        if group.is_unsharded or _is_being_gathered(group):
            return
        in_forward = group._training_state != TrainingState.PRE_BACKWARD
        if group in self._kept and self._reuse(in_forward=in_forward):
            group._to_unsharded()  # type: ignore[no-untyped-call]
            return
        type(group).unshard(group, async_op)
        if _is_being_gathered(group):
            self._kept.add(group)
            self._made()

    def _free_unless_kept(self, group: FSDPParamGroup, parameter: Any) -> None:
        if group not in self._kept:
            type(parameter).free_unsharded_param(parameter)


def _is_being_gathered(group: FSDPParamGroup) -> bool:
    return group._all_gather_result is not None


def ever_unsharded(module: FSDPModule) -> bool:
    """Whether the parameters of ``module`` itself have been gathered yet."""
    return all(hasattr(p, "_unsharded_param") for group in _param_groups(module) for p in group.fsdp_params)


def drop_unreduced_gradients(module: FSDPModule) -> None:
    """Forget the whole gradients of ``module`` itself that no backward has reduced yet."""
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def unshard(module: FSDPModule) -> None:
    """Gather the parameters of ``module`` itself, unless they are, to require gradients as their shards do now."""
    module.unshard()
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_param.requires_grad_(parameter.sharded_param.requires_grad)


def expect_backward(root: FSDPModule, loss: Tensor) -> None:
    """Tell ``root`` that a backward from ``loss`` comes before its forward has returned."""
    root._get_fsdp_state()._register_pre_backward_hook(loss)


def reduces_unused_parameters(module: FSDPModule) -> bool:
    """Whether this torch can do what follows."""
    return hasattr(module, "set_reduce_scatter_unused_params")


def reduce_unused_parameters(module: FSDPModule, enabled: bool) -> None:
    """Let parameters of ``module`` that got no gradient take part in the next reduction, as zeros (torch >= 2.13)."""
    if reduces_unused_parameters(module):
        module.set_reduce_scatter_unused_params(enabled, recurse=False)


def forget_iteration(root: FSDPModule) -> None:
    """Drop gradient sums and pending communication of an iteration that will not be finished."""
    if root._get_fsdp_state()._is_root is None:  # no forward yet; resetting would fail on what is not there
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _reset_iter_state(root)


def fsdp_modules(root: nn.Module | FSDPModule) -> dict[str, FSDPModule]:
    """Every module under ``root`` that FSDP2 shards by name, ``root`` included."""
    assert isinstance(root, nn.Module)
    return {name: module for name, module in root.named_modules() if isinstance(module, FSDPModule)}


def _param_groups(module: FSDPModule) -> Iterator[FSDPParamGroup]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # a list since 2.13, one or none before
    yield from groups if groups is not None else filter(None, [state._fsdp_param_group])


def _reset_iter_state(root: FSDPModule) -> None:
    """What FSDP2 does itself since 2.13."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    shared: Any = root._get_fsdp_state()
    shared._state_ctx.iter_forward_root = None
    shared._state_ctx.post_backward_final_callback_queued = False
    shared._comm_ctx.all_gather_state = shared._comm_ctx.reduce_scatter_state = None
    shared._comm_ctx.post_forward_order.clear()
    for module in fsdp_modules(root).values():
        module._get_fsdp_state()._training_state = TrainingState.IDLE
        for group in _param_groups(module):
            group._training_state = TrainingState.IDLE
            group._all_gather_result = group._partial_reduce_output = None
            group._post_reduce_event = group._all_reduce_state = None
            group._post_forward_indices.clear()
            group._to_sharded()  # type: ignore[no-untyped-call]
