"""Changes that users make to sharded tensors: by assignment to ``.data``, by row, and with unsharded operands.

DTensor itself ignores an assignment to ``.data``, and rejects unsharded operands. Here the first takes effect, and an
unsharded operand stands for equal values on all ranks, as a replica under DDP does. Only tensors on meshes of
:func:`accept_changes` are concerned, and only outside of autograd: weights that are computed with are in
:mod:`lightning_mics._torch.units.direct_use`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_mics._torch.dtensors.arithmetic import is_alike
from lightning_mics._torch.dtensors.views import (
    VIEWS,
    all_values,
    is_ours,
    meshes,
    own_part,
    records_autograd,
    run_default,
    view_across,
)

aten = torch.ops.aten

Kind = TypeVar("Kind", bound=type[Tensor])

_data: Any = torch._C.TensorBase.data
_parameters: weakref.WeakValueDictionary[int, FSDPParam] = weakref.WeakValueDictionary()  # by id of the sharded one

IN_PLACE = [
    name
    for name in dir(Tensor)
    if name.endswith("_")
    and not name.startswith("_")
    and hasattr(aten, name)
    and name not in ("set_", "resize_", "requires_grad_")
] + ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"]
BY_ROWS = {  # DTensor does these on each part by itself, or changes the placement of what it should change
    *("addbmm_", "addmm_", "addmv_", "addr_", "baddbmm_", "cumprod_", "cumsum_", "fill_diagonal_", "index_add_"),
    *("index_copy_", "index_fill_", "index_put_", "index_reduce_", "masked_scatter_", "put_", "renorm_", "scatter_"),
    *("scatter_add_", "scatter_reduce_", "tril_", "triu_", "__setitem__"),
}
BY_ELEMENT = {"add_", "sub_", "mul_", "div_", "pow_", "lerp_", "addcmul_", "addcdiv_", "copy_", *IN_PLACE[-6:-1]}
OF_OPTIMIZERS = {"add_", "sub_", "mul_", "div_", "lerp_", "addcmul_", "addcdiv_"}  # for each parameter in each step


def accept_changes(mesh: DeviceMesh) -> None:
    """Accept changes of DTensors on ``mesh``: see the module."""
    meshes.add(mesh)
    if "data" in vars(DTensor):
        return
    kind: Any = DTensor
    kind.data = property(_get_data, _set_data)
    accept_unsharded_operands(DTensor)
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    for view in VIEWS:
        handlers[view] = view_across
    handlers[aten.eye.m_out] = handlers[aten.eye.out] = _write_out
    for name in dir(aten):
        if name.startswith("_foreach_") and name.endswith("_"):
            for overload in getattr(aten, name).overloads():
                handlers[getattr(getattr(aten, name), overload)] = _change_each


def know_parameter(parameter: FSDPParam) -> None:
    """Let an assignment to ``.data`` of a sharded parameter reach the memory that FSDP2 gathers from."""
    _parameters[id(parameter.sharded_param)] = parameter


# -- .data -------------------------------------------------------------------------------------------------------------


def _get_data(tensor: DTensor) -> Tensor:
    """The same memory, with a version of its own for a foreign tensor, and a shared one, so that changes count."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach() if is_ours(tensor) else _data.__get__(tensor)


def _set_data(tensor: DTensor, value: Tensor) -> None:
    """Give a sharded tensor other values, in memory of their own: what ``.data`` returned before keeps its values."""
    if not is_ours(tensor):
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
            detached: Any = value.detach()
            local = detached.redistribute(tensor.device_mesh, tensor.placements)._local_tensor
        else:
            local = own_part(value.detach(), tensor)
        parameter: Any = _parameters.get(id(tensor))
        if parameter is None or parameter.sharded_param is not tensor:
            tensor._local_tensor = local.clone()
        else:
            padded = local.new_zeros(parameter.padded_sharded_param_size)
            padded.narrow(0, 0, local.size(0)).copy_(local)
            parameter._sharded_param_data = padded.view(-1)
            tensor._local_tensor = padded.narrow(0, 0, local.size(0))
    torch.autograd.graph.increment_version(tensor)


@contextmanager
def calling_before_gradients(function: Callable[[], None]) -> Iterator[None]:
    """Inside, call ``function`` once, before the first ``.grad`` of a DTensor is read or set."""
    kind: Any = DTensor
    own: Any = torch._C.TensorBase.grad

    def end() -> None:
        if vars(kind).get("grad") is watched:
            del kind.grad

    def read(tensor: DTensor) -> Tensor | None:
        end()
        function()
        gradient: Tensor | None = own.__get__(tensor)
        return gradient

    def write(tensor: DTensor, value: Tensor | None) -> None:
        end()
        function()
        own.__set__(tensor, value)

    watched = property(read, write, partial(write, value=None))
    kind.grad = watched
    try:
        yield
    finally:
        end()


# -- unsharded operands ------------------------------------------------------------------------------------------------


def accept_unsharded_operands(kind: type[Tensor]) -> None:
    """Let the in-place methods of ``kind`` mix sharded and unsharded tensors."""
    for name in IN_PLACE:
        if name not in vars(kind):
            setattr(kind, name, _mixed_in_place(name))


def accept_sharded_operands(kind: Kind) -> Kind:
    """Class decorator: let in-place methods of a class of unsharded tensors take sharded operands."""
    accept_unsharded_operands(kind)
    return kind


def _mixed_in_place(name: str) -> Callable[..., Any]:
    method, of_optimizers = getattr(Tensor, name), name in OF_OPTIMIZERS

    @wraps(method)
    def change(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if of_optimizers and type(tensor) is DTensor:
            parts = _parts_alike(tensor, args)
            if parts is not None:
                method(tensor._local_tensor, *parts, **kwargs)
                torch.autograd.graph.increment_version(tensor)
                return tensor
        try:
            if name not in BY_ROWS or type(tensor) is not DTensor or not is_ours(tensor):
                return method(tensor, *args, **kwargs)
            if records_autograd((tensor, args, kwargs)):
                return method(tensor, *args, **kwargs)
        except RuntimeError:
            if not _can_mix(tensor, args, kwargs) or records_autograd((tensor, args, kwargs)):
                raise
        if isinstance(tensor, DTensor) and name in BY_ELEMENT:  # each rank on its own part
            with implicit_replication():
                return method(tensor, *args, **kwargs)
        args, kwargs = tree_map_only(DTensor, all_values, (args, kwargs))
        if not isinstance(tensor, DTensor):
            return method(tensor, *args, **kwargs)
        whole = all_values(tensor).clone()
        method(whole, *args, **kwargs)
        with torch.no_grad():
            tensor._local_tensor.copy_(own_part(whole, tensor))
        torch.autograd.graph.increment_version(tensor)
        return None if name == "__setitem__" else tensor

    return change


def _parts_alike(tensor: DTensor, operands: Sequence[Any]) -> list[Any] | None:
    """This rank's parts of operands that are sharded as ``tensor`` is, and numbers; None if there are others.

    On parts an operation by element takes less time than DTensor's own way. It is for a step of an optimizer: nothing
    is recorded for a backward, or compiled.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_ours(tensor) or tensor.is_inference():
        return None
    parts: list[Any] = []
    for operand in operands:
        if type(operand) is DTensor:
            if not is_alike(tensor._spec, operand._spec):
                return None
            parts.append(operand._local_tensor)
        elif isinstance(operand, Tensor):
            return None
        else:
            parts.append(operand)
    return parts


def _can_mix(tensor: Tensor, args: Any, kwargs: Any) -> bool:
    sharded = [t for t in tree_leaves((tensor, args, kwargs)) if isinstance(t, DTensor)]
    return bool(sharded) and all(map(is_ours, sharded))


def _change_each(operation: Any, args: Any, kwargs: Any) -> Any:
    """``torch._foreach_*_`` on lists of sharded tensors and unsharded ones: element by element on this rank's parts.

    Optimizers call it with sharded tensors only, which takes less time than DTensor's own way.
    """
    changed = args[0]
    operands = [*args, *kwargs.values()]
    lists = [operand for operand in operands if isinstance(operand, list | tuple)]
    if _alike(lists):
        parts = [[t._local_tensor for t in o] if isinstance(o, list | tuple) else o for o in operands]
    elif all(is_ours(t) for t in tree_leaves(operands) if isinstance(t, DTensor)):
        parts = [_parts(operand, changed) for operand in operands]
    else:
        return run_default(operation, args, kwargs)
    parts = [all_values(part) if isinstance(part, DTensor) else part for part in parts]
    operation(*parts[: len(args)], **dict(zip(kwargs, parts[len(args) :], strict=True)))
    torch.autograd.graph.increment_version(changed)
    return None


def _write_out(operation: Any, args: Any, kwargs: Any) -> Any:
    """An operation that writes to ``out``; DTensor would give a sharded one another placement."""
    out = kwargs["out"]
    if not is_ours(out):
        return run_default(operation, args, kwargs)
    whole = all_values(out).clone()
    operation(*args, **{**kwargs, "out": whole})
    out._local_tensor.copy_(own_part(whole, out))
    torch.autograd.graph.increment_version(out)
    return out


def _alike(lists: list[Any]) -> bool:
    """Whether lists hold sharded tensors only, all of one mesh of ours and with the same placements."""
    first = lists[0][0]
    if not is_ours(first):
        return False
    mesh, placements = first._spec.mesh, first._spec.placements
    return all(
        type(t) is DTensor and t._spec.mesh is mesh and t._spec.placements == placements for each in lists for t in each
    )


def _parts(operand: Any, changed: Any) -> Any:
    if not (isinstance(operand, list | tuple) and operand and isinstance(operand[0], Tensor)):
        return operand
    return [_part(value, like=target) for value, target in zip(operand, changed, strict=True)]


def _part(value: Any, *, like: Tensor) -> Tensor:
    """``value`` where ``like`` is: this rank's part if that is sharded, else all of it."""
    if not isinstance(like, DTensor):
        return all_values(value) if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        return value if value.ndim == 0 else own_part(value, like)
    if value.ndim and value.placements != like.placements:
        value = value.redistribute(like.device_mesh, like.placements)
    local: Tensor = value._local_tensor
    return local
