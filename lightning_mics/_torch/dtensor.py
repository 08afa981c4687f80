"""Changes that users make to sharded tensors: by assignment to ``.data``, by row, and with unsharded operands.

DTensor itself ignores an assignment to ``.data``, returns copies where a view crosses the sharded dimension, and rejects
unsharded operands. Here the first takes effect, a changed copy is written back, and an unsharded operand stands for
equal values on all ranks, as a replica under DDP does. Only tensors on meshes of :func:`accept_changes` are concerned,
and only outside of autograd: a forward with unsharded inputs and sharded weights is still an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

Kind = TypeVar("Kind", bound=type[Tensor])

_data: Any = torch._C.TensorBase.data
_meshes: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()
_parameters: weakref.WeakValueDictionary[int, FSDPParam] = weakref.WeakValueDictionary()  # by id of the sharded one

OPERATORS = [f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow") for side in ("", "r")]
FUNCTIONS = ["add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv", "where", "masked_fill", "maximum", "minimum"]
COMPARISONS = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "equal", "allclose", "isclose"]
IN_PLACE = [
    name
    for name in dir(Tensor)
    if name.endswith("_") and not name.startswith("_") and hasattr(aten, name) and name not in ("set_", "resize_")
] + ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"]


def accept_changes(mesh: DeviceMesh) -> None:
    """Accept changes of DTensors on ``mesh``: see the module."""
    _meshes.add(mesh)
    if "data" in vars(DTensor):
        return
    DTensor.data = property(_get_data, _set_data)  # type: ignore[assignment,method-assign]
    accept_unsharded_operands(DTensor)
    handlers = DTensor._op_dispatcher._custom_op_handlers
    for view in VIEWS:
        handlers[view] = _view
    for name in dir(aten):
        if name.startswith("_foreach_") and name.endswith("_"):
            for overload in getattr(aten, name).overloads():
                handlers[getattr(getattr(aten, name), overload)] = _change_each


def know_parameter(parameter: FSDPParam) -> None:
    """Let an assignment to ``.data`` of a sharded parameter reach the memory that FSDP2 gathers from."""
    _parameters[id(parameter.sharded_param)] = parameter


def _is_ours(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) and tensor._spec.mesh in _meshes and not any(
        placement.is_partial() for placement in tensor._spec.placements
    )


def _sharded(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part, [shard], of a tensor with equal values on all ranks, [any]; does not communicate."""
    part: Any = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    local: Tensor = part._local_tensor
    return local


def _whole(tensor: DTensor) -> Tensor:
    """All values of a sharded tensor: [any]; every rank of its partition group calls it."""
    spec = tensor._spec
    target = DTensorSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, tensor_meta=spec.tensor_meta)
    with torch.no_grad():
        return redistribute_local_tensor(tensor._local_tensor.detach(), spec, target)


def _records_autograd(arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(arguments))


# -- .data -------------------------------------------------------------------------------------------------------------


def _get_data(tensor: DTensor) -> Tensor:
    """The same memory, with a version of its own for a foreign tensor, and a shared one, so that changes count."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach() if _is_ours(tensor) else _data.__get__(tensor)


def _set_data(tensor: DTensor, value: Tensor) -> None:
    """Give a sharded tensor other values, in memory of their own: what ``.data`` returned before keeps its values."""
    if not _is_ours(tensor):
        _data.__set__(tensor, value)
        return
    for what in ("shape", "dtype", "device"):
        given, own = getattr(value, what), getattr(tensor, what)
        if given != own:
            raise ValueError(
                f"a sharded tensor keeps its {what} {own}; the one that was assigned to its `.data` has {given}"
            )
    with torch.no_grad():
        if isinstance(value, DTensor):
            local = value.detach().redistribute(tensor.device_mesh, tensor.placements)._local_tensor
        else:
            local = _sharded(value.detach(), tensor)
        parameter: Any = _parameters.get(id(tensor))
        if parameter is None or parameter.sharded_param is not tensor:
            tensor._local_tensor = local.clone()
        else:
            padded = local.new_zeros(parameter.padded_sharded_param_size)
            padded.narrow(0, 0, local.size(0)).copy_(local)
            parameter._sharded_param_data = padded.view(-1)
            tensor._local_tensor = padded.narrow(0, 0, local.size(0))
    torch.autograd.graph.increment_version(tensor)


# -- unsharded operands ------------------------------------------------------------------------------------------------


def accept_unsharded_operands(kind: type[Tensor]) -> None:
    """Let the operators and in-place methods of ``kind`` mix sharded and unsharded tensors."""
    for name in IN_PLACE:
        setattr(kind, name, _mixed_in_place(name))
    for name in OPERATORS + FUNCTIONS + COMPARISONS:
        setattr(kind, name, _mixed(name))


def accept_sharded_operands(kind: Kind) -> Kind:
    """Class decorator: let a class of unsharded tensors take sharded operands."""
    accept_unsharded_operands(kind)
    return kind


def _mixed_in_place(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    @wraps(method)
    def change(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(tensor, *args, **kwargs)
        except RuntimeError:
            if not _can_mix(tensor, args, kwargs) or _records_autograd((tensor, args, kwargs)):
                raise
        if isinstance(tensor, DTensor):
            try:
                with implicit_replication():
                    return method(tensor, *args, **kwargs)
            except RuntimeError:
                pass
        args, kwargs = tree_map_only(DTensor, _whole, (args, kwargs))
        if not isinstance(tensor, DTensor):
            return method(tensor, *args, **kwargs)
        whole = _whole(tensor).clone()
        method(whole, *args, **kwargs)
        with torch.no_grad():
            tensor._local_tensor.copy_(_sharded(whole, tensor))
        torch.autograd.graph.increment_version(tensor)
        return None if name == "__setitem__" else tensor

    return change


def _mixed(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    @wraps(method)
    def operate(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(tensor, *args, **kwargs)
        except RuntimeError:
            operands = (tensor, args, kwargs)
            if not _can_mix(*operands) or _records_autograd(operands) or not _of_one_shape(operands):
                raise
        with implicit_replication():
            return method(tensor, *args, **kwargs)

    return operate


def _can_mix(tensor: Tensor, args: Any, kwargs: Any) -> bool:
    sharded = [t for t in tree_leaves((tensor, args, kwargs)) if isinstance(t, DTensor)]
    return bool(sharded) and all(map(_is_ours, sharded))


def _of_one_shape(operands: Any) -> bool:
    """Whether unsharded operands can only be masks, factors or other values of the sharded one, not activations."""
    tensors = [t for t in tree_leaves(operands) if isinstance(t, Tensor)]
    shape = next(t.shape for t in tensors if isinstance(t, DTensor))
    try:
        return torch.broadcast_shapes(*(t.shape for t in tensors)) == shape
    except RuntimeError:
        return False


def _change_each(operation: Any, args: Any, kwargs: Any) -> Any:
    """``torch._foreach_*_`` on lists of sharded tensors and unsharded ones: element by element on this rank's parts."""
    changed = args[0]
    sharded = [t for t in tree_leaves((args, kwargs)) if isinstance(t, DTensor)]
    if not all(map(_is_ours, sharded)):
        return _default(operation, args, kwargs)

    def parts(values: Any) -> Any:
        if not (isinstance(values, list | tuple) and values and isinstance(values[0], Tensor)):
            return values
        return [_part(value, like=target) for value, target in zip(values, changed, strict=True)]

    operation(*map(parts, args), **{name: parts(value) for name, value in kwargs.items()})
    torch.autograd.graph.increment_version(changed)
    return None


def _part(value: Tensor, *, like: Tensor) -> Tensor:
    """``value`` where ``like`` is: this rank's part if that is sharded, else all of it."""
    if not isinstance(like, DTensor):
        return _whole(value) if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        return value if value.ndim == 0 else _sharded(value, like)
    if value.placements != like.placements:
        value = value.redistribute(like.device_mesh, like.placements)
    return value._local_tensor


def _default(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that has a handler here as DTensor itself does."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handler = handlers.pop(operation)
    try:
        return operation(*args, **kwargs)
    finally:
        handlers[operation] = handler


# -- views -------------------------------------------------------------------------------------------------------------

VIEWS = (
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.diagonal.default,
    aten.unfold.default,
    aten.view.default,
    aten.squeeze.dim,
    aten.squeeze.default,
)


class _Copy:
    """An unsharded copy of a sharded tensor, which views across its sharded dimension share.

    Args:
        sharded: The sharded tensor.
    """

    def __init__(self, sharded: DTensor) -> None:
        self._sharded = sharded
        self.whole = _whole(sharded).clone()  # [any]
        self._version = self._current_version()

    def refresh(self) -> None:
        """Take over what has changed in the sharded tensor since; every rank of its partition group calls it."""
        if self._version != self._current_version():
            self.whole.copy_(_whole(self._sharded))
            self._version = self._current_version()

    def write_back(self) -> None:
        """Write this rank's rows to the sharded tensor."""
        self._sharded._local_tensor.copy_(_sharded(self.whole, self._sharded))
        torch.autograd.graph.increment_version(self._sharded)
        self._version = self._current_version()

    def _current_version(self) -> tuple[int, int]:
        return self._sharded._version, self._sharded._local_tensor._version


class _View(DTensor):
    """A view of a sharded tensor across its sharded dimension: changes of it are written back."""

    _copy: _Copy

    @classmethod
    def of(cls, local: Tensor, mesh: DeviceMesh, copy: _Copy) -> _View:
        meta = TensorMeta(local.shape, local.stride(), local.dtype)
        spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
        view: Any = DTensor(local, spec, requires_grad=False)
        view.__class__ = cls
        view._copy = copy
        return view  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [t for t in tree_leaves((args, kwargs)) if isinstance(t, _View)]
        for view in views:
            view._copy.refresh()
        plain_args, plain_kwargs = tree_map_only(_View, _as_dtensor, (args, kwargs or {}))
        changes = operation._schema.is_mutable
        if changes or (not _records_autograd((args, kwargs)) and _of_one_shape((plain_args, plain_kwargs))):
            with implicit_replication():
                result = operation(*plain_args, **plain_kwargs)
        else:
            result = operation(*plain_args, **plain_kwargs)
        if not changes:
            return tree_map_only(DTensor, lambda out: _still_view(out, views), result)
        for view in views:
            view._copy.write_back()
        return args[0]


def _as_dtensor(view: _View) -> Any:
    return DTensor(view._local_tensor, view._spec, requires_grad=False)  # type: ignore[call-arg,arg-type]


def _still_view(out: DTensor, views: Iterable[_View]) -> DTensor:
    memory = out._local_tensor.untyped_storage()._cdata
    for view in views:
        if view._copy.whole.untyped_storage()._cdata == memory:
            return _View.of(out._local_tensor, out.device_mesh, view._copy)
    return out


def _view(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run a view operation; across the sharded dimension, on an unsharded copy whose changes are written back."""
    base = args[0]
    if not _is_ours(base) or not any(p.is_shard() for p in base.placements) or _is_everything(operation, base, args):
        return _default(operation, args, kwargs)
    if not _crosses(operation, base, args):
        try:
            return _default(operation, args, kwargs)
        except RuntimeError:  # such as a view of uneven shards
            if operation is not aten.view.default:
                raise
    copy = _Copy(base)
    result = operation(copy.whole, *args[1:], **kwargs)
    return tree_map_only(Tensor, lambda out: _View.of(out, base.device_mesh, copy), result)


def _dim(operation: Any, base: DTensor, args: Any) -> int | None:
    position = {aten.select.int: 1, aten.slice.Tensor: 1, aten.unbind.int: 1, aten.unfold.default: 1}.get(operation)
    position = 2 if operation in (aten.split.Tensor, aten.split_with_sizes.default) else position
    if position is None:
        return None
    dim: int = args[position] if len(args) > position else 0
    return dim % base.ndim


def _crosses(operation: Any, base: DTensor, args: Any) -> bool:
    sharded: Iterator[int] = (p.dim for p in base.placements if p.is_shard())
    if operation is aten.diagonal.default:
        return True
    if operation is aten.squeeze.default:
        return any(base.size(dim) == 1 for dim in sharded)
    if operation is aten.squeeze.dim:
        return args[1] % base.ndim in sharded
    return _dim(operation, base, args) in sharded


def _is_everything(operation: Any, base: DTensor, args: Any) -> bool:
    if operation is not aten.slice.Tensor:
        return False
    _, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    return (start or 0) in (0, -base.size(dim)) and (end is None or end >= base.size(dim)) and step == 1
