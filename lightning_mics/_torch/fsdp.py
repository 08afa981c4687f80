"""Private names of FSDP2, and what differs between its versions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

# FSDP2's communication interface has no public path yet (https://github.com/pytorch/pytorch/pull/155189).
from torch.distributed.fsdp._fully_shard import _fsdp_api, _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import _get_param_all_gather_inputs
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_mics._torch.units.shards import shards_in

__all__ = [
    "OptimizedModule",
    "is_fake",
]

own_grad: Any = torch._C.TensorBase.grad  # of a tensor itself, where a subclass shows that of its shard


def has_inner_tensors(tensor: Tensor) -> bool:
    """Whether the data of ``tensor``, [any], are other tensors, as those of quantized weights and of DTensors are."""
    return bool(is_traceable_wrapper_subclass(tensor))


class OrdinaryBuffers:
    """Memory of FSDP2's collectives as torch gives it: neither symmetric nor a process group's."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that FSDP2 fills for a collective, or has it filled by one: [size].

        Args:
            size: Numbers of elements, one per dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(OrdinaryBuffers, _fsdp_api.AllGather):
    """Base class of the all-gathers that FSDP2 calls to unshard parameters, with ordinary buffers."""


class ReduceScatter(OrdinaryBuffers, _fsdp_api.ReduceScatter):
    """Base class of the reduce-scatters that FSDP2 calls for gradients, with ordinary buffers."""


def unsharded_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The trainable parameters of ``module`` itself, unsharded, each [any]; their memory may be freed now."""
    return [
        p._unsharded_param
        for group in _param_groups(module)
        for p in group.fsdp_params
        if p.sharded_param.requires_grad
    ]


def partial_sums(module: FSDPModule) -> list[Tensor]:
    """FSDP2's partial reductions of ``module`` itself, pending until hop 2: each [shard]."""
    return [g._partial_reduce_output for g in _param_groups(module) if g._partial_reduce_output is not None]


def has_pending_gradients(module: FSDPModule) -> bool:
    """Whether FSDP2 holds pending gradients of ``module`` itself: unsharded, or partially reduced."""
    return any(
        group._partial_reduce_output is not None or any(map(_has_unreduced_gradient, group.fsdp_params))
        for group in _param_groups(module)
    )


def trainable(module: FSDPModule) -> list[bool]:
    """Whether each parameter of ``module`` itself requires gradients, sharded at the moment or not: [parameters]."""
    return [p.sharded_param.requires_grad for group in _param_groups(module) for p in group.fsdp_params]


def sharded_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The sharded parameters of ``module`` itself, also while it is unsharded: DTensors, each [any]."""
    return [p.sharded_param for group in _param_groups(module) for p in group.fsdp_params]


def weights_version(module: FSDPModule) -> tuple[Hashable, ...]:
    """The versions of the sharded parameters of ``module`` itself; each changes with every update that torch records.

    torch does not record changes in raw memory. See [Note: When cached weights are dropped].
    """
    return tuple(_version(p) for group in _param_groups(module) for p in group.fsdp_params)


def _version(parameter: Any) -> Hashable:
    shard = parameter.sharded_param
    return shard._version, shard._local_tensor._version, parameter._sharded_param_data.untyped_storage()._cdata


def _has_unreduced_gradient(parameter: Any) -> bool:
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (
        unsharded is not None and own_grad.__get__(unsharded) is not None
    )


def replace_all_reduce(module: FSDPModule, reduce: Callable[[Tensor, Any], None]) -> None:
    """Run ``reduce`` after every reduce-scatter of ``module`` itself, in place of FSDP2's all-reduce.

    FSDP2 can run a hook after its all-reduce, but not replace it. The all-reduce runs if the mesh of a parameter group
    has an axis of replicas. So the group gets a mesh without that axis, and the hook is hop 2. Parameters stay on the
    mesh with both axes. FSDP2 then adds the shard to the gradient as the hook leaves it: see
    [Note: Zero gradients before the boundary].

    Args:
        module: FSDP module, already sharded.
        reduce: Called as ``reduce(shard, op)`` with the result of the reduce-scatter, [shard], to reduce in place.
    """
    for group in _param_groups(module):
        mesh_info = FSDPMeshInfo(mesh=group.mesh_info.mesh, shard_mesh_dim=group.mesh_info.shard_mesh_dim)
        group.mesh_info = mesh_info
        if group.post_forward_mesh_info is not None:
            group.post_forward_mesh_info = mesh_info

    def hook(shard: Tensor) -> None:
        has_divide_factor = any(group.gradient_divide_factor is not None for group in _param_groups(module))
        reduce(shard, dist.ReduceOp.SUM if has_divide_factor else dist.ReduceOp.AVG)

    module.set_all_reduce_hook(hook)


class ReusedUnshard:
    """Unsharded parameters of one module itself that stay in memory after a reshard; the module shows their shards.

    FSDP2 gathers them at each use and frees them afterwards. Here they are not freed, and where ``stale`` returns some
    of them, those alone are gathered.

    Args:
        module: FSDP module.
        stale: Called before each use; returns the positions of the parameters in memory that are not valid, and those
            of all if none is.
        used: Called as ``used(in_forward=...)`` after it, if not all are gathered.
        unsharded: Called when parameters are gathered.
        gather: Called as ``gather(output, shard, group)`` to gather some of them, side by side: [shard] ->
            [ranks * shard].
    """

    def __init__(
        self,
        module: FSDPModule,
        *,
        stale: Callable[[], Sequence[int]],
        used: Callable[..., None],
        unsharded: Callable[[], None],
        gather: Callable[[Tensor, Tensor, Any], object],
    ) -> None:
        self._groups = list(_param_groups(module))
        self._stale = stale
        self._used = used
        self._unsharded = unsharded
        self._gather = gather
        self._cached: set[FSDPParamGroup] = set()
        for group in self._groups:
            group.unshard = partial(self._unshard, group)  # type: ignore[method-assign]
            for parameter in group.fsdp_params:
                free = partial(self._free_unless_cached, group, parameter)
                parameter.free_unsharded_param = free  # type: ignore[method-assign]

    def free(self) -> None:
        """Free the unsharded parameters now, or when they are resharded."""
        self._cached.clear()
        for group in self._groups:
            if group.is_sharded:
                for parameter in group.fsdp_params:
                    parameter.free_unsharded_param()

    def tensors(self) -> list[Tensor]:
        """Memory of each unsharded parameter: [ranks * shard]."""
        return [
            out for group in self._groups for parameter in group.fsdp_params for out in parameter.all_gather_outputs
        ]

    def own_parts(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's part of each unsharded parameter, [shard], and its shard now, [shard], both as gathered."""
        parts: list[tuple[Tensor, Tensor]] = []
        for group in self._groups:
            mesh_info: Any = group.mesh_info
            position = mesh_info.shard_mesh_rank
            shards = _get_param_all_gather_inputs(group.fsdp_params)  # casts them all at once
            for parameter, of_parameter in zip(group.fsdp_params, shards, strict=True):
                for unsharded, shard in zip(parameter.all_gather_outputs, of_parameter, strict=True):
                    of_ranks = shards_in(unsharded, parameter, ranks=mesh_info.shard_mesh_size)
                    parts.append((of_ranks[position].reshape(-1), shard))
        return parts

    def _unshard(self, group: FSDPParamGroup, async_op: bool = False) -> None:
        if group.is_unsharded or _is_unsharding(group):
            return
        if group in self._cached and len(self._groups) == 1:
            stale = [group.fsdp_params[index] for index in self._stale()]
            if len(stale) < len(group.fsdp_params):
                if stale:
                    self._gather_again(group, stale)
                    self._unsharded()
                self._used(in_forward=group._training_state != TrainingState.PRE_BACKWARD)
                group._to_unsharded()  # type: ignore[no-untyped-call]
                return
        type(group).unshard(group, async_op)
        if _is_unsharding(group):
            self._cached.add(group)
            self._unsharded()

    @torch.no_grad()
    def _gather_again(self, group: FSDPParamGroup, parameters: Sequence[Any]) -> None:
        """Gather some parameters of a group into their memory."""
        inputs, pg = _get_param_all_gather_inputs(list(parameters)), group._all_gather_process_group
        shards = [shard for of_parameter in inputs for shard in of_parameter]
        outputs = [(out, parameter) for parameter in parameters for out in parameter.all_gather_outputs]
        views = [shards_in(out, parameter, ranks=pg.size()) for out, parameter in outputs]
        if len({shard.dtype for shard in shards}) > 1:
            shards, views = ([each.view(torch.uint8) for each in tensors] for tensors in (shards, views))
        own = torch.cat(shards)
        gathered = own.new_empty(pg.size() * own.numel())
        self._gather(gathered, own, pg)
        parts = torch.split(gathered.view(pg.size(), -1), [shard.numel() for shard in shards], dim=1)
        with torch.autograd._unsafe_preserve_version_counter(tuple(out for out, _ in outputs)):  # type: ignore[attr-defined]
            for view, part in zip(views, parts, strict=True):
                view.copy_(part.reshape(view.shape))

    def _free_unless_cached(self, group: FSDPParamGroup, parameter: Any) -> None:
        if group not in self._cached:
            type(parameter).free_unsharded_param(parameter)


def _is_unsharding(group: FSDPParamGroup) -> bool:
    return group._all_gather_result is not None


def use_as_default_mesh(mesh: DeviceMesh, *, model: nn.Module) -> None:
    """Make ``fully_shard`` without a mesh shard over ``mesh`` in place of all ranks, as long as ``model`` is alive.

    Args:
        mesh: Mesh of the model.
        model: A sharded model.
    """
    module: Any = _fully_shard
    original, alive = module._init_default_mesh, weakref.ref(model)
    module._init_default_mesh = lambda *args: mesh if alive() is not None else original(*args)


def ever_unsharded(module: FSDPModule) -> bool:
    """Whether the parameters of ``module`` itself have been unsharded at least once."""
    return all(hasattr(p, "_unsharded_param") for group in _param_groups(module) for p in group.fsdp_params)


def drop_unreduced_gradients(module: FSDPModule) -> None:
    """Drop the unsharded pending gradients of ``module`` itself."""
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                own_grad.__set__(parameter._unsharded_param, None)


def drop_partial_sums(module: FSDPModule) -> None:
    """Drop FSDP2's partial reductions of ``module`` itself."""
    for group in _param_groups(module):
        group._partial_reduce_output = None


def unshard(module: FSDPModule) -> None:
    """Unshard ``module`` itself if it is sharded, and copy ``requires_grad`` of its shards to the parameters."""
    module.unshard()
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_param.requires_grad_(parameter.sharded_param.requires_grad)


def continue_forward(root: FSDPModule) -> None:
    """Go on with a forward of ``root`` inside which another one of it has ended.

    The inner one leaves FSDP2 idle, and so the outer one would reshard the root, for its backward to gather it again.
    """
    state: Any = root._get_fsdp_state()
    state._training_state = TrainingState.FORWARD
    state._state_ctx.iter_forward_root = state
    for group in _param_groups(root):
        group._training_state = TrainingState.FORWARD


def finish_backward(root: FSDPModule) -> None:
    """Reduce unreduced gradients of a model, as FSDP2 does at the end of a backward for modules that were not reached.

    Args:
        root: Root FSDP module.
    """
    root._get_fsdp_state()._root_post_backward_final_callback()


def expect_backward(root: FSDPModule, loss: Tensor) -> None:
    """Prepare ``root`` for a backward that begins before its forward has returned.

    Args:
        root: Root FSDP module.
        loss: Tensor that the backward begins at: [].
    """
    root._get_fsdp_state()._register_pre_backward_hook(loss)


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of the backward that is running, when FSDP2 has finished too.

    Args:
        function: Function without arguments.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(function))  # FSDP2's own may be queued in between


def reduce_unused_parameters(module: FSDPModule, enabled: bool) -> None:
    """Include parameters of ``module`` without a gradient in its reductions, as zeros.

    torch 2.13 adds the zeros; before that :func:`~lightning_mics._torch.units.param_groups.note_reductions` does. See
    [Note: Zero gradients before the boundary].

    Args:
        module: FSDP module.
        enabled: Whether such parameters take part in the reductions from now on.
    """
    for group in _param_groups(module):
        group.reduce_scatter_unused_params = enabled


def forget_iteration(root: FSDPModule) -> None:
    """Drop FSDP2's partial reductions and pending communication of an iteration that will not be finished."""
    if root._get_fsdp_state()._is_root is None:  # before the first forward, which makes the attributes to reset
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _reset_iter_state(root)


def is_in_iteration(root: FSDPModule) -> bool:
    """Whether a forward or backward of a module under ``root`` has begun and not ended, as after an error in it."""
    return any(
        group._training_state != TrainingState.IDLE
        for module in fsdp_modules(root).values()
        for group in _param_groups(module)
    )


def fsdp_modules(root: nn.Module | FSDPModule) -> dict[str, FSDPModule]:
    """The FSDP modules under ``root``, itself included, by fully qualified name."""
    assert isinstance(root, nn.Module)
    return {name: module for name, module in root.named_modules() if isinstance(module, FSDPModule)}


def _param_groups(module: FSDPModule) -> Iterator[FSDPParamGroup]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # a list since 2.13, one or none before
    yield from groups if groups is not None else filter(None, [state._fsdp_param_group])


def _reset_iter_state(root: FSDPModule) -> None:
    """Copy of ``FSDPModule.reset_iter_state`` for torch before 2.13.

    The current stream waits for FSDP2's; the host does not: a collective that a lost rank is missing in never ends.
    """
    shared: Any = root._get_fsdp_state()
    current = shared._device_handle.current_stream()
    for stream in (
        shared._comm_ctx.all_gather_copy_in_stream,
        shared._comm_ctx.all_gather_stream,
        shared._comm_ctx.reduce_scatter_stream,
        shared._comm_ctx.all_reduce_stream,
    ):
        current.wait_stream(stream)
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
