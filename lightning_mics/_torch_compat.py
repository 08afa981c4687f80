"""Differences between torch versions, and every private path of torch that this package uses.

torch 2.13 is what the package is developed on. torch 2.11 and 2.12 run it where a partition group stays in one node, or
has one rank on each; the checks here say what needs the newer version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch._dynamo import OptimizedModule
from torch._subclasses import fake_tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.fsdp import FSDPModule

# FSDP2's communication interface has no public path yet (https://github.com/pytorch/pytorch/pull/155189).
from torch.distributed.fsdp._fully_shard import _fsdp_api, _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "FakeTensorMode",
    "OptimizedModule",
    "TorchDispatchMode",
    "all_gather_single",
    "reduce_scatter_single",
    "tree_leaves",
    "tree_map_only",
    "unflatten_state_dict",
]

HAS_UNSORTED_GROUPS = hasattr(dist, "all_gather_single")  # `sort_ranks` came with it, in 2.13

all_gather_single = dist.all_gather_single if HAS_UNSORTED_GROUPS else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if HAS_UNSORTED_GROUPS else dist.reduce_scatter_tensor


class FakeTensorMode(fake_tensor.FakeTensorMode):  # type: ignore[no-untyped-call]
    """The same, of one kind with copies: a model may be made of deep copies of a block, as `nn.Transformer` is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensorMode:
        return self


class _OrdinaryBuffers:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_OrdinaryBuffers, _fsdp_api.AllGather):
    """What FSDP2 calls to gather parameters, with ordinary buffers."""


class ReduceScatter(_OrdinaryBuffers, _fsdp_api.ReduceScatter):
    """What FSDP2 calls to reduce gradients, with ordinary buffers."""


def check_order(ranks: tuple[int, ...]) -> None:
    """Refuse a group whose order torch cannot keep.

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
        ranks: The members.
        name: What torch's own messages call it.
        timeout: For its collectives; None is the backend's default.

    Raises:
        RuntimeError: If the order is one that this torch cannot keep.
    """
    check_order(ranks)
    order: dict[str, Any] = {"sort_ranks": False} if list(ranks) != sorted(ranks) else {}
    group = dist.new_group(
        list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"mics {name}", **order
    )
    assert isinstance(group, dist.ProcessGroup)  # the caller is a member
    return group


def groups_made() -> int:
    """How many process groups this rank has made: torch names new ones by it, and members must find the same name."""
    return len(dist.distributed_c10d._world.pg_names)


_rehearsed_backend: str | None = None


@contextmanager
def rehearsed_job(*, world_size: int, rank: int, backend: str) -> Iterator[None]:
    """Make this process ``rank`` of a job whose other ranks do not exist: collectives return at once.

    Args:
        world_size: Ranks in the job.
        rank: This one.
        backend: What :func:`backend_name` tells, of all groups.

    Raises:
        RuntimeError: If this process is part of a real job.
    """
    global _rehearsed_backend
    if dist.is_initialized():
        raise RuntimeError(
            "a job is rehearsed in a process that is not part of another one: torch.distributed is in use"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _rehearsed_backend = backend
    fsdp_param: Any = _fsdp_param
    chunk_with_empty, fsdp_param._chunk_with_empty = fsdp_param._chunk_with_empty, _Chunks
    try:
        yield
    finally:
        fsdp_param._chunk_with_empty = chunk_with_empty
        _rehearsed_backend = None
        dist.destroy_process_group()
        _forget_meshes()


class _Chunks:
    """The parts of a parameter, made when they are asked for. FSDP2 makes those of all ranks and takes its own, which
    on fake tensors takes longer than all else where there are hundreds.
    """

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._size
        left = self._tensor.shape[self._dim] - start
        return self._tensor.narrow(self._dim, start, min(self._size, left)) if left > 0 else self._tensor.new_empty(0)


def _forget_meshes() -> None:
    """DTensor's caches hold meshes, and find those of another job that has equal ones, with groups that are gone."""
    forget = getattr(dist.tensor.debug, "_clear_sharding_prop_cache", None)  # torch >= 2.13
    if forget is not None:
        forget()


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend of ``group`` for ``device``, as in "gloo"."""
    return _rehearsed_backend or group._get_backend(device).name()


def group_of(operation: Any, args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """The process group of an operation of torch.distributed that a dispatch mode has seen; None for any other."""
    if operation.namespace == "_c10d_functional":
        names = [argument for argument in args if isinstance(argument, str)]
        return _resolve_process_group(names[-1]) if names else None  # type: ignore[arg-type]
    if operation.namespace != "c10d":
        return None
    objects = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    return next((dist.ProcessGroup.unbox(o) for o in objects if "ProcessGroup" in str(o._type())), None)


@contextmanager
def watched_resizes(resized: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Call ``resized(storage, bytes before)`` after each change of a storage's size, by which FSDP2 frees memory."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: Any, size: int) -> Any:
        before = storage.nbytes()
        result = resize(storage, size)
        resized(storage, before)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


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


def premultiplied_sum_factor(op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> float | None:
    """The factor of a pre-multiplied sum, or None for any other reduction."""
    if op != dist.ReduceOp.PREMUL_SUM:
        return None
    state: Any = op.__getstate__()  # (kind, factor); the factor has no public getter
    return float(state[1])


def deferred_sums(module: FSDPModule) -> bool:
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


def ever_gathered(module: FSDPModule) -> bool:
    """Whether the parameters of ``module`` itself have been gathered yet."""
    return all(hasattr(p, "_unsharded_param") for group in _param_groups(module) for p in group.fsdp_params)


def drop_unreduced_gradients(module: FSDPModule) -> None:
    """Forget the whole gradients of ``module`` itself that no backward has reduced yet."""
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def gather(module: FSDPModule) -> None:
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


def was_left_waiting(error: RuntimeError) -> bool:
    """Whether a collective has failed because another rank did not take part; gloo says so in words only."""
    return isinstance(error, dist.DistError) or bool(
        re.search("Timed out waiting|[Cc]onnection (closed|reset) by peer", str(error))
    )


def fsdp_modules(root: nn.Module | FSDPModule) -> dict[str, FSDPModule]:
    """Every module under ``root`` that FSDP2 shards by name, ``root`` included."""
    assert isinstance(root, nn.Module)
    return {name: module for name, module in root.named_modules() if isinstance(module, FSDPModule)}


def own_slices(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part is in the whole ``tensor``: a slice for each of its dimensions."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # as its own checkpoints have it
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


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


def locate_values(stored: IO[bytes]) -> tuple[Tensor, int]:
    """A tensor that ``torch.save`` has written, without its values, and the byte at which they begin."""
    with FakeTensorMode():
        tensor: Tensor = torch.load(stored, weights_only=True)
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None  # which it is for what comes from a file
    return tensor, int(begin + tensor.storage_offset() * tensor.itemsize)
