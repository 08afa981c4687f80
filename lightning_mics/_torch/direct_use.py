"""Sharded tensors used together with unsharded ones: ``block.up(x)``, ``functional.linear(x, block.up.weight)``.

FSDP2 gathers the weights of a block while its forward runs. Outside of it they are DTensors, which take no unsharded
operands: "got mixed torch.Tensor and DTensor". Here such an operation gets the unsharded weights, and its gradient is
the mean over all ranks, as under DDP::

    forward     shard [rows/p, columns]  -- all-gather ----------->  weight [rows, columns]  -- operation -->  output
    backward    shard [rows/p, columns]  <-- reduce-scatter, mean --  gradient of this rank  <-- operation --  gradient

The unsharded weights are gathered again for the backward, not kept for it. An operation on sharded tensors alone, as in
a penalty over ``parameters()``, stays one; its result is gathered where it meets a loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from lightning_mics._torch.fsdp import _param_groups, fsdp_modules
from lightning_mics._torch.use_errors import MIXED, mixed

Count = Callable[[str, str, int], None]

_class: Any = DTensor
TORCHS_OWN = vars(DTensor).get("__torch_function__", torch._C._disabled_torch_function_impl)
META_ONLY = (Tensor.to, Tensor.type_as, Tensor.is_same_size, torch.is_same_size, torch.result_type)
POINTWISE = ("add", "sub", "mul", "div", "true_divide", "pow", "lerp", "addcmul", "addcdiv", "where", "masked_fill")

_meshes: list[tuple[weakref.ref[DeviceMesh], Count]] = []  # not a set: torch compares meshes by their content
_left_unsharded: list[Callable[[], None]] = []
_unsharded: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # FSDPParam by id of its shard


def serve_direct_use(root: FSDPModule, mesh: DeviceMesh, *, count: Count) -> None:
    """Serve operations that mix unsharded tensors with DTensors on ``mesh``, from now on.

    Not inside of an optimizer's step, except for its closure.

    Args:
        root: Sharded model.
        mesh: Mesh of the model.
        count: Called as ``count(kind, axis, total_bytes)`` for each collective: kind as in
            :class:`~lightning_mics.collectives.traffic.Traffic`, axis of the mesh by name.
    """
    if not _meshes:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
    _meshes[:] = [(weakref.ref(mesh), count), *((known, other) for known, other in _meshes if known() is not None)]
    assert isinstance(root, nn.Module)
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    for parameter in _parameters(root):
        parameter._param_fqn = names.get(id(parameter.sharded_param))  # FSDP2 does so at the first forward
        _unsharded[id(parameter.sharded_param)] = parameter
    switch_on()


def take_direct_gradients(root: FSDPModule, take: Callable[[Any, Tensor], None]) -> None:
    """Let ``take`` have the gradients that come from direct use, in place of ``.grad``.

    Args:
        root: Sharded model.
        take: Called as ``take(parameter, gradient)`` with a sharded parameter, [any], and its gradient, [any].
    """
    for parameter in _parameters(root):
        parameter.take_direct_gradient = take


def switch_on() -> None:
    """Serve operations; see :func:`serve_direct_use`."""
    _class.__torch_function__ = SERVING


def after_next_step(reshard: Callable[[], None]) -> None:
    """Call ``reshard`` after the next step of an optimizer, of whichever model: weights that it finds are outdated.

    Args:
        reshard: Reshards parameter groups that were left unsharded.
    """
    _left_unsharded.append(reshard)


def switch_off() -> Any:
    """Let operations on DTensors run as torch alone runs them, which takes less time on the host.

    Returns:
        The state before, for :func:`switch_back`.
    """
    before = vars(_class).get("__torch_function__", TORCHS_OWN)
    _class.__torch_function__ = TORCHS_OWN
    return before


def switch_back(before: Any) -> None:
    """Restore the state before :func:`switch_off`.

    Args:
        before: What it returned.
    """
    _class.__torch_function__ = before


def torchs_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the operations on DTensors inside run as torch alone runs them: see :func:`switch_off`.

    Args:
        function: Code of a framework, which does not mix sharded and unsharded tensors.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = switch_off()
        try:
            return function(*args, **kwargs)
        finally:
            switch_back(before)

    return run


def averaged(gradient: Tensor, like: DTensor) -> DTensor:
    """The mean of a gradient over all ranks, sharded as a DTensor is; all ranks of its mesh call it.

    Args:
        gradient: Gradient of this rank: [any]; a DTensor is returned as it is.
        like: DTensor that it is the gradient of: [any].
    """
    if isinstance(gradient, DTensor):
        return gradient
    mean: DTensor = _Averaged.apply(gradient, like._spec)  # type: ignore[no-untyped-call]
    return mean


def _torch_function(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Runs instead of an operation that has a DTensor among its operands."""
    kwargs = kwargs or {}
    if function is torch.autograd.grad:
        args, kwargs = _with_unsharded_inputs(*args, **kwargs)
    elif torch.is_grad_enabled():
        for operand in _flat((*args, *kwargs.values())):
            if isinstance(operand, DTensor) and (parameter := _unsharded.get(id(operand))) is not None:
                _redirect_gradient(parameter)
    if function is not torch.autograd.grad and len(args) + len(kwargs) > 1 and _mixes(function, args, kwargs):
        return _serve(function, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if MIXED not in str(error) or not any(map(_count_of, _sharded_in(args, kwargs))):
                raise
            raise mixed(str(error), names=_names(_sharded_in(args, kwargs))) from error


def _redirect_gradient(parameter: Any) -> None:
    """Take the gradient of a sharded parameter before autograd adds it to ``.grad``, for as long as its graph lives."""
    with torch._C.DisableTorchFunctionSubclass():
        sharded = parameter.sharded_param
        if not sharded.requires_grad:
            return
        node: Any = torch.autograd.graph.get_gradient_edge(sharded).node
        if node.metadata.get("taken"):
            return
        node.metadata["taken"] = True
    of = weakref.ref(parameter)

    def take(gradients: tuple[Tensor | None, ...]) -> Any:
        alive = of()
        if alive is None or gradients[0] is None:
            return None
        alive.take_direct_gradient(alive.sharded_param, gradients[0])
        return (None,)

    node.register_prehook(take)


def _names(sharded: Sequence[Tensor]) -> list[str]:
    """The FQNs of those that are parameters."""
    known = (_unsharded.get(id(tensor)) for tensor in sharded)
    return [str(parameter._param_fqn) for parameter in known if parameter is not None]


def _parameters(root: FSDPModule) -> list[Any]:
    return [p for module in fsdp_modules(root).values() for group in _param_groups(module) for p in group.fsdp_params]


SERVING: Any = classmethod(_torch_function)


def _before_step(_optimizer: Any, args: Any, kwargs: Any) -> Any:
    switch_off()
    if callable(kwargs.get("closure")):
        return args, kwargs | {"closure": _serving(kwargs["closure"])}
    return ((args[0], _serving(args[1]), *args[2:]), kwargs) if len(args) > 1 and callable(args[1]) else None


def _after_step(*_: Any) -> None:
    switch_on()
    for reshard in _left_unsharded:
        reshard()
    _left_unsharded.clear()


def _serving(closure: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        switch_on()
        try:
            return closure()
        finally:
            switch_off()

    return run


# -- which operations are served ---------------------------------------------------------------------------------------


def _mixes(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether ``function`` computes from DTensors of ours and unsharded tensors, and DTensor itself would not do it."""
    operands = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
    unsharded = [t for t in operands if not isinstance(t, DTensor)]
    if not unsharded or function in META_ONLY or function.__name__ == "__set__" or "out" in kwargs:
        return False
    sharded = _sharded_in(args, kwargs)
    if isinstance(args[0], DTensor) and _changes_first(function.__name__):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if _class._op_dispatcher._allow_implicit_replication or any(_count_of(t) is None for t in sharded):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            return True
        if all(t.numel() == 1 for t in unsharded):  # DTensor takes scalars
            return False
        return function.__name__.strip("_") not in POINTWISE or not _of_one_shape(sharded[0], unsharded)


def _changes_first(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__"))


def _of_one_shape(sharded: Tensor, unsharded: Sequence[Tensor]) -> bool:
    """Whether the unsharded ones can only be masks or factors for the sharded one, [any], and no activations."""
    try:
        shape: Any = torch.broadcast_shapes(sharded.shape, *(t.shape for t in unsharded))  # type: ignore[no-untyped-call]
        return bool(shape == sharded.shape)
    except RuntimeError:
        return False


def _flat(values: Any) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list | tuple) else (value,))]


def _sharded_in(args: Any, kwargs: Any) -> list[DTensor]:
    return [t for t in _flat((*args, *kwargs.values())) if isinstance(t, DTensor)]


def _count_of(tensor: DTensor) -> Count | None:
    return _count_on(tensor._spec.mesh)


def _count_on(mesh: DeviceMesh) -> Count | None:
    return next((count for known, count in _meshes if known() == mesh), None)


def _with_unsharded_inputs(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """The arguments of ``autograd.grad``, with the parameters that forwards have used in place of their shards."""
    listed = (inputs,) if isinstance(inputs, Tensor) else inputs
    replaced = [getattr(_unsharded.get(id(each)), "_unsharded_param", each) for each in listed]
    return (outputs, replaced, *args), kwargs


# -- how they are served -----------------------------------------------------------------------------------------------


def _serve(function: Any, args: Any, kwargs: Any) -> Any:
    """Run ``function`` on unsharded tensors; those saved for its backward are gathered again there."""
    gathered: dict[int, Tensor] = {}  # by id of the sharded one
    memory: dict[int, DTensor] = {}  # by storage of the unsharded one

    def gather(sharded: DTensor) -> Tensor:
        if id(sharded) not in gathered:
            unsharded: Tensor = _Gathered.apply(sharded)  # type: ignore[no-untyped-call]
            gathered[id(sharded)], memory[unsharded.untyped_storage()._cdata] = unsharded, sharded
        return gathered[id(sharded)]

    def pack(saved: Tensor) -> Any:
        sharded = memory.get(saved.untyped_storage()._cdata) if not isinstance(saved, DTensor) else None
        return saved if sharded is None else _Saved.of(saved, sharded)

    def unpack(saved: Any) -> Tensor:
        return saved.gather() if isinstance(saved, _Saved) else saved

    with torch._C.DisableTorchFunctionSubclass():
        args, kwargs = tree_map_only(DTensor, gather, (args, kwargs))
    with saved_tensors_hooks(pack, unpack) if torch.is_grad_enabled() else nullcontext():
        return function(*args, **kwargs)


@dataclass(frozen=True)
class _Saved:
    """A tensor in the memory of an unsharded one, saved for a backward as its shard."""

    sharded: DTensor
    version: int
    size: Sequence[int]
    stride: Sequence[int]
    offset: Any

    @classmethod
    def of(cls, saved: Tensor, sharded: DTensor) -> _Saved:
        return cls(sharded, sharded._version, saved.size(), saved.stride(), saved.storage_offset())

    def gather(self) -> Tensor:
        if self.sharded._version != self.version:
            raise RuntimeError("a weight that was used directly has changed in place before its gradient was computed")
        return _gather(self.sharded).as_strided(self.size, self.stride, self.offset)


class _Gathered(torch.autograd.Function):
    """The unsharded tensor of a DTensor; its gradient is the mean over ranks."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor) -> Tensor:
        ctx.spec = sharded._spec
        return _gather(sharded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Averaged.apply(gradient, ctx.spec)  # type: ignore[no-untyped-call]


class _Averaged(torch.autograd.Function):
    """The mean of a tensor over all ranks, as a DTensor; its gradient is that of a loss that is a mean over ranks."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, spec: DTensorSpec) -> Any:
        return _average(gradient, spec)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _Gathered.apply(gradient), None  # type: ignore[no-untyped-call]


def _gather(sharded: DTensor) -> Tensor:
    spec = sharded._spec
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        local = sharded._local_tensor.detach()
        _record(spec, spec.placements, local)
        whole = redistribute_local_tensor(local, spec, _with(spec, [Replicate()] * spec.mesh.ndim))
        return whole.detach().contiguous()


def _average(gradient: Tensor, spec: DTensorSpec) -> Any:
    target: list[Placement] = [Replicate() if each.is_partial() else each for each in spec.placements]
    pending: list[Placement] = [Partial() for _ in target]
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        local = (gradient.detach() / spec.mesh.size()).contiguous()
        for axis in reversed(range(spec.mesh.ndim)):  # shards first: fewer bytes go between replicas
            before = _with(spec, pending)
            pending = [*pending[:axis], target[axis], *pending[axis + 1 :]]
            _record(spec, [each if i == axis else Replicate() for i, each in enumerate(before.placements)], local)
            local = redistribute_local_tensor(local, before, _with(spec, pending))
        meta = TensorMeta(gradient.shape, spec.stride, gradient.dtype)
        return _class(local, DTensorSpec(spec.mesh, tuple(target), tensor_meta=meta), requires_grad=False)


def _with(spec: DTensorSpec, placements: Sequence[Placement]) -> DTensorSpec:
    return DTensorSpec(spec.mesh, tuple(placements), tensor_meta=spec.tensor_meta)


def _record(spec: DTensorSpec, before: Sequence[Placement], local: Tensor) -> None:
    count = _count_on(spec.mesh)
    for axis, placement in enumerate(before):
        name = (spec.mesh.mesh_dim_names or ("shard",))[axis]
        if count is not None and placement.is_shard():
            count("all_gather", name, spec.mesh.size(axis) * local.nbytes)
        elif count is not None and placement.is_partial():
            scattered = spec.placements[axis].is_shard()
            count("reduce_scatter" if scattered else "all_reduce", name, local.nbytes)
