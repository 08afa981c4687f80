"""Sharded tensors used together with unsharded ones: ``block.up(x)``, ``functional.linear(x, block.up.weight)``.

FSDP2 gathers the weights of a block while its forward runs. Outside of it they are DTensors, which take no unsharded
operands: "got mixed torch.Tensor and DTensor". Here such an operation runs on unsharded values, which are gathered for
it alone, in a forward as in a backward: what autograd saves are the shards. So the gradient of a sharded parameter is
this rank's own, as for a replica under DDP; :func:`take_direct_gradients` hands it to whoever averages it::

    forward     shard [rows/p, columns]  -- all-gather ----->  weight [rows, columns]  -- operation -->  output
    backward    shard [rows/p, columns]  -- all-gather ----->  weight [rows, columns]  -- operation -->  gradients
                                         <-- reduce-scatter --  gradient of the weight

An operation on sharded tensors alone, as in a penalty over ``parameters()``, stays one; its result is gathered where it
meets a loss.

Operations arrive here below autograd, in handlers of DTensor's dispatcher. Without gradients, an unsharded operand that
can only be a mask, a factor or other values of a parameter stands for equal values on all ranks, as in
:mod:`lightning_mics._torch.dtensors.changes`, and the result is sharded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_map_only

from lightning_mics._torch.dtensors.arithmetic import ARITHMETIC, on_own_part
from lightning_mics._torch.dtensors.shards import with_local
from lightning_mics._torch.dtensors.views import DISPATCHES, is_of_one_shape, run_default
from lightning_mics._torch.fsdp import _param_groups, fsdp_modules
from lightning_mics._torch.units.axis_collectives import along_axis
from lightning_mics._torch.units.use_errors import MIXED, mixed

Around = Callable[[Any, str, int, str], AbstractContextManager[None]]

aten = torch.ops.aten

TENSORS = ("Tensor", "Optional[Tensor]")
LISTS = ("List[Tensor]", "List[Optional[Tensor]]")
IN_PLACE = (aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor, aten.copy_.default)

# of models and their root's state, which has the model's `around`; no set: torch compares meshes by their content
_meshes: list[tuple[weakref.ref[DeviceMesh], weakref.ref[Any]]] = []
_parameters: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # FSDPParam by id of its shard
_run_backward = torch.autograd.graph._engine_run_backward
_TAKEN = "lightning_mics.direct_use"  # of a node's metadata


def serve_direct_use(root: FSDPModule, mesh: DeviceMesh, *, around: Around) -> None:
    """Serve operations that mix unsharded tensors with DTensors on ``mesh``, from now on.

    Args:
        root: Sharded model.
        mesh: Mesh of the model.
        around: Called as ``around(kind, axis, total_bytes, name)`` for each collective, which runs inside: kind as in
            :class:`~lightning_mics.collectives.traffic.Traffic`, axis of the mesh by name, what is communicated.
    """
    _handle_operations()
    assert isinstance(root, nn.Module)
    state: Any = root._get_fsdp_state()
    state.around_direct_use = around
    alive = ((known, of_root) for known, of_root in _meshes if known() is not None and of_root() is not None)
    _meshes[:] = [(weakref.ref(mesh), weakref.ref(state)), *alive]
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    for parameter in _fsdp_parameters(root):
        parameter._param_fqn = names.get(id(parameter.sharded_param))  # FSDP2 does so at the first forward
        _parameters[id(parameter.sharded_param)] = parameter


def take_direct_gradients(root: FSDPModule, take: Callable[[Any, Tensor], None]) -> None:
    """Let ``take`` have the gradients that come from direct use, in place of ``.grad``.

    Args:
        root: Sharded model.
        take: Called as ``take(parameter, gradient)`` with a sharded parameter, [any], and its gradient, [any].
    """
    for parameter in _fsdp_parameters(root):
        parameter.take_direct_gradient = take


def _take_gradients_of_shards() -> None:
    """See that gradients of sharded parameters are taken in the backward that begins now, whatever they come from."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return  # a compiler's, of no sharded parameter
    if torch._C._are_functorch_transforms_active():
        return  # torch.func's, which accumulates nothing
    parameters = list(_parameters.values())
    with torch.enable_grad():
        used = _Used.apply(*(each.sharded_param for each in parameters))  # type: ignore[no-untyped-call]
    if used.grad_fn is None:
        return
    for parameter, (node, _) in zip(parameters, used.grad_fn.next_functions, strict=True):
        # a node lives as long as a graph: whoever kept it would keep its parameter, and what hooks of that refer to
        if node is not None and _TAKEN not in node.metadata:
            node.metadata[_TAKEN] = True
            node.register_prehook(partial(_take_gradient, weakref.ref(parameter)))


class _Used(torch.autograd.Function):
    """Has the nodes that accumulate gradients of its operands, and runs no operation: torch's own way takes views."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        return torch.empty(0)


def _take_gradient(of: Callable[[], Any], gradients: tuple[Tensor | None, ...]) -> Any:
    parameter = of()
    if parameter is None or gradients[0] is None:
        return None
    parameter.take_direct_gradient(parameter.sharded_param, gradients[0])
    return (None,)


def averaged(gradient: Tensor, like: DTensor) -> Any:
    """The mean of a gradient over all ranks, sharded as a DTensor is; all ranks of its mesh call it.

    Args:
        gradient: Gradient of this rank: [any]; a DTensor is returned with the same placements.
        like: DTensor that it is the gradient of: [any].
    """
    if isinstance(gradient, DTensor):
        return gradient.redistribute(like.device_mesh, like.placements)
    spec = like._spec
    pending: list[Placement] = [Partial() for _ in spec.placements]
    with torch.no_grad():
        local = (gradient.detach() / spec.mesh.size()).contiguous()
        for axis in reversed(range(spec.mesh.ndim)):  # shards first: fewer bytes go between replicas
            kind = "reduce_scatter" if spec.placements[axis].is_shard() else "all_reduce"
            with _around(like, kind, axis, local.nbytes):
                local = along_axis(local, spec, axis, pending, spec.placements[axis])
            pending[axis] = spec.placements[axis]
        return with_local(local.to(like._local_tensor.device), like=like)


# -- which operations are served ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _handle_operations() -> None:
    """Handle all operations of torch that combine tensors, and those that change an unsharded one."""
    autograd: Any = torch.autograd
    autograd._engine_run_backward = _run_backward_of_unsharded
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    for operation in (*combining_operations(), *IN_PLACE):
        known = handlers.get(operation, run_default)
        if operation is not aten.is_same_size.default:
            handlers[operation] = _Handler(known, is_arithmetic=operation in ARITHMETIC)


@lru_cache(maxsize=1)
def combining_operations() -> tuple[Any, ...]:
    """The operations of torch that take several tensors and change none of them."""
    return tuple(_combining())


def _combining() -> Iterator[Any]:
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::") or "_foreach_" in schema.name:
            continue
        kinds = [str(argument.type) for argument in schema.arguments]
        if (sum(map(kinds.count, TENSORS)) > 1 or any(map(kinds.count, LISTS))) and not schema.is_mutable:
            yield getattr(getattr(aten, schema.name.removeprefix("aten::")), schema.overload_name or "default")


class _Handler:
    """Runs an operation that has a DTensor among its operands.

    Args:
        default: DTensor's own way, with the same arguments.
        is_arithmetic: Whether the operation may run on this rank's part at once.
    """

    def __init__(self, default: Callable[[Any, Any, Any], Any], *, is_arithmetic: bool) -> None:
        self._default = default
        self._is_arithmetic = is_arithmetic

    def __call__(self, operation: Any, args: Any, kwargs: Any) -> Any:
        if self._is_arithmetic:
            result = on_own_part(operation, args, kwargs)
            if result is not NotImplemented:
                return result
        operands = _tensors_in((*args, *kwargs.values()) if kwargs else args)
        unsharded = [t for t in operands if not isinstance(t, DTensor)]
        if not unsharded:
            return self._default(operation, args, kwargs)
        sharded = [t for t in operands if isinstance(t, DTensor)]
        foreign = any(_around_on(t.device_mesh) is None for t in sharded)
        if foreign or DTensor._op_dispatcher._allow_implicit_replication:
            return self._default(operation, args, kwargs)
        changes_sharded = operation in IN_PLACE and isinstance(args[0], DTensor)
        if not changes_sharded and (_is_autograds(sharded) or _is_computed(operation, operands, unsharded)):
            args, kwargs = tree_map_only(DTensor, _Gathered(), (args, kwargs))
            return operation(*args, **kwargs)
        try:
            if changes_sharded or all(t.numel() == 1 for t in unsharded):  # DTensor takes scalars
                return self._default(operation, args, kwargs)
            with implicit_replication():
                return self._default(operation, args, kwargs)
        except RuntimeError as error:
            if MIXED not in str(error):
                raise
            raise mixed(str(error), names=[_name(t) for t in sharded]) from error


def _tensors_in(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _is_autograds(sharded: Sequence[Tensor]) -> bool:
    """Whether a backward runs the operation, and no hook in it that changes gradients, such as ``p.grad * mask``."""
    if torch._C._current_graph_task_id() == -1:
        return False
    caller = sys._getframe(1).f_back
    while caller is not None and caller.f_code in DISPATCHES:
        caller = caller.f_back  # none in a thread of autograd's own
    by_autograd = caller is None or caller.f_code is _run_backward.__code__
    return by_autograd or any(_parameter_of(t) is not None for t in sharded)


def _is_computed(operation: Any, operands: Sequence[Tensor], unsharded: Sequence[Tensor]) -> bool:
    """Whether an operation computes with sharded tensors as with weights, and does not change or compare them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return True
    if operation in IN_PLACE:
        return True
    can_be_replicated = torch.Tag.pointwise in operation.tags and is_of_one_shape(operands)
    return not can_be_replicated and any(t.numel() != 1 for t in unsharded)


def _run_backward_of_unsharded(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Torch's way to run a backward, with the parameters that forwards have used in addition to their shards."""
    _take_gradients_of_shards()
    inputs = args[3] if len(args) > 3 else ()
    known = [_record_of(each) for each in inputs]
    if not any(known):
        return _run_backward(outputs, *args, **kwargs)
    return _both(outputs, inputs, known, *args, **kwargs)


def _both(outputs: Any, inputs: Any, known: Any, *args: Any, **kwargs: Any) -> Any:
    unsharded = [getattr(parameter, "_unsharded_param", None) for parameter in known]
    added = [each for each in unsharded if each is not None and each.requires_grad]
    if kwargs.get("accumulate_grad"):
        return _run_backward(outputs, *args[:3], (*inputs, *added), *args[4:], **kwargs)
    allow_unused = args[4]
    found = iter(_run_backward(outputs, *args[:3], (*inputs, *added), True, *args[5:], **kwargs))
    own = [next(found) for _ in inputs]
    others = {id(each): next(found) for each in added}
    result = []
    for sharded, each, parameter in zip(own, unsharded, known, strict=True):
        gradients = [g for g in (sharded, others.get(id(each))) if g is not None]
        if len(gradients) > 1:
            gradients = [_gather(g) if isinstance(g, DTensor) else g for g in gradients]
        if not gradients and not allow_unused:
            where = "" if parameter is None else f" ({parameter._param_fqn})"
            raise RuntimeError(
                f"One of the differentiated Tensors{where} appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        result.append(sum(gradients[1:], start=gradients[0]) if gradients else None)
    return tuple(result)


# -- how they are served -----------------------------------------------------------------------------------------------


class _Gathered:
    """Gathers sharded tensors for one operation, each once."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}  # by id of the sharded one

    def __call__(self, sharded: DTensor) -> Tensor:
        if id(sharded) not in self._values:
            self._values[id(sharded)] = _gather(sharded)
        return self._values[id(sharded)]


def _gather(sharded: DTensor) -> Tensor:
    """All values of a sharded tensor or a partial sum: [any]."""
    spec = sharded._spec
    local = sharded._local_tensor.to(spec.mesh.device_type)  # it may be in host memory
    placements: list[Placement] = list(spec.placements)
    with torch.no_grad():
        for axis in reversed(range(spec.mesh.ndim)):
            before = placements[axis]
            if before.is_replicate():
                continue
            kind = "all_gather" if before.is_shard() else "all_reduce"
            parts = spec.mesh.size(axis) if before.is_shard() else 1
            with _around(sharded, kind, axis, parts * local.nbytes):
                local = along_axis(local, spec, axis, placements, Replicate())
            placements[axis] = Replicate()
        return local


def _around(sharded: DTensor, kind: str, axis: int, total_bytes: int) -> AbstractContextManager[None]:
    mesh = sharded.device_mesh
    around = _around_on(mesh)
    assert around is not None
    return around(kind, (mesh.mesh_dim_names or ("shard",))[axis], total_bytes, _name(sharded))


def _around_on(mesh: DeviceMesh) -> Around | None:
    states = (of_root() for known, of_root in _meshes if known() == mesh)
    return next((state.around_direct_use for state in states if state is not None), None)


def _parameter_of(sharded: Tensor) -> Any:
    """FSDP2's record of a sharded parameter, or of the one that a tensor is a view of."""
    return _record_of(sharded) or _record_of(sharded._base)


def _record_of(tensor: Tensor | None) -> Any:
    """FSDP2's record of a tensor if that is a sharded parameter now: one that is gone may have had the same id."""
    known = _parameters.get(id(tensor))
    return known if known is not None and known.sharded_param is tensor else None


def _name(sharded: Tensor) -> str:
    """The FQN of a parameter or of the one that a tensor is a view of; other tensors by their shape."""
    parameter = _parameter_of(sharded)
    return f"a tensor of {tuple(sharded.shape)}" if parameter is None else f"parameter {parameter._param_fqn!r}"


def _fsdp_parameters(root: FSDPModule) -> list[Any]:
    return [p for module in fsdp_modules(root).values() for group in _param_groups(module) for p in group.fsdp_params]
