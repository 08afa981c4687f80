"""Sharded tensors whose changes by users take effect: what they are, and views across their sharded dimension.

DTensor returns copies where a view crosses the sharded dimension, such as a row of a weight. Here a changed copy is
written back. Only tensors on the meshes of models that were sharded here are concerned.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_mics._torch.process_groups import KEEPS_ORDER

aten = torch.ops.aten

meshes: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()  # of models that were sharded here


def is_ours(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor of a model that was sharded here, and no partial sum."""
    return (
        isinstance(tensor, DTensor)
        and tensor._spec.mesh in meshes
        and not any(placement.is_partial() for placement in tensor._spec.placements)
    )


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part, [shard], of a tensor with equal values on all ranks; does not communicate.

    Args:
        whole: Tensor with equal values on all ranks: [any].
        like: Sharded tensor whose part is at the same place: [any].
    """
    part: Any = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    local: Tensor = part._local_tensor
    return local


def all_values(tensor: DTensor) -> Tensor:
    """All values of a sharded tensor: [any]; every rank of its partition group calls it."""
    spec = tensor._spec
    target = DTensorSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, tensor_meta=spec.tensor_meta)
    with torch.no_grad():
        return redistribute_local_tensor(tensor._local_tensor.detach(), spec, target)


def records_autograd(arguments: Any) -> bool:
    """Whether an operation with these arguments is recorded for a backward."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(arguments))


def is_of_one_shape(operands: Any) -> bool:
    """Whether unsharded operands can only be masks, factors or other values of the sharded one, not activations."""
    tensors = [t for t in tree_leaves(operands) if isinstance(t, Tensor)]
    shape = next(t.shape for t in tensors if isinstance(t, DTensor))
    broadcast: Any = torch.broadcast_shapes
    try:
        return bool(broadcast(*(t.shape for t in tensors)) == shape)
    except RuntimeError:
        return False


def run_default(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that has a handler here as DTensor itself does.

    Args:
        operation: Overload of an operation of ``aten``.
        args: Positional arguments, with sharded tensors among them.
        kwargs: Keyword arguments.
    """
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


_dtensor: Any = partial(DTensor, requires_grad=False)


class _Copy:
    """An unsharded copy of a sharded tensor, which views across its sharded dimension share.

    Args:
        sharded: The sharded tensor.
    """

    def __init__(self, sharded: DTensor) -> None:
        self._sharded = sharded
        self.whole = all_values(sharded).clone()  # [any]
        self._version = self._current_version()

    def refresh(self) -> None:
        """Take over what has changed in the sharded tensor since; every rank of its partition group calls it."""
        if self._version != self._current_version():
            self.whole.copy_(all_values(self._sharded))
            self._version = self._current_version()

    def write_back(self) -> None:
        """Write this rank's rows to the sharded tensor."""
        self._sharded._local_tensor.copy_(own_part(self.whole, self._sharded))
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
        view = _dtensor(local, spec)
        view.__class__ = cls
        view._copy = copy
        return view  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        views = [t for t in tree_leaves((args, kwargs)) if isinstance(t, _View)]
        for view in views:
            view._copy.refresh()
        plain_args, plain_kwargs = tree_map_only(_View, _as_dtensor, (args, kwargs or {}))
        changes = operation._schema.is_mutable
        if changes:
            with implicit_replication():
                result = operation(*plain_args, **plain_kwargs)
        else:
            result = operation(*plain_args, **plain_kwargs)
        if not changes:
            return tree_map_only(DTensor, lambda out: _still_view(out, views), result)
        for view in views:
            view._copy.write_back()
        return args[0]


def _call_with_views(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What :class:`_View` does with an operation, for torch before 2.13: there no subclass of DTensor is asked."""
    views = [t for t in tree_leaves((args, kwargs)) if isinstance(t, _View)]
    for view in views:
        view._copy.refresh()
    with torch._C.DisableTorchFunctionSubclass():
        versions = [view._version for view in views]
        with implicit_replication() if function.__name__.endswith("_") else nullcontext():
            result = function(*args, **(kwargs or {}))
        changed = [view for view, version in zip(views, versions, strict=True) if view._version != version]
    for view in changed:
        view._copy.write_back()
    return result if changed else tree_map_only(DTensor, lambda out: _still_view(out, views), result)


if not KEEPS_ORDER:
    _View.__torch_function__ = classmethod(_call_with_views)  # type: ignore[assignment]


_dispatch: Any = _View.__torch_dispatch__
DISPATCHES = (run_default.__code__, _dispatch.__func__.__code__)  # what runs between a caller and a handler


def _as_dtensor(view: _View) -> Any:
    kind: Any = DTensor
    return kind(view._local_tensor, view._spec, requires_grad=view.requires_grad)


def _still_view(out: DTensor, views: Iterable[_View]) -> DTensor:
    memory = out._local_tensor.untyped_storage()._cdata
    for view in views:
        if view._copy.whole.untyped_storage()._cdata == memory:
            return _View.of(out._local_tensor, out.device_mesh, view._copy)
    return out


def view_across(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run a view operation; across the sharded dimension, on an unsharded copy whose changes are written back.

    Args:
        operation: Overload of an operation of ``aten``.
        args: Positional arguments, with sharded tensors among them.
        kwargs: Keyword arguments.
    """
    base = args[0]
    if not is_ours(base) or not any(p.is_shard() for p in base.placements) or _is_everything(operation, base, args):
        return run_default(operation, args, kwargs)
    if not _crosses(operation, base, args):
        try:
            result = run_default(operation, args, kwargs)
            if operation is not aten.view.default or all(type(p) in (Shard, Replicate) for p in result.placements):
                return result  # not of strided shards, as of flattened columns, whose own views are no views
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
    placements: Any = base.placements
    sharded = {placement.dim for placement in placements if placement.is_shard()}
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
    given: list[Any] = [*args[1:]]
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    size = base.shape[dim]
    return (start or 0) in (0, -size) and (end is None or end >= size) and bool(step == 1)
