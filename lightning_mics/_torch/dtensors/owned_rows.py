"""Sharded tensors whose rows lie elsewhere for now: with the holders of an owned matrix.

Between the boundary and the step, the sum of an owned matrix's gradient is not on the ranks that hold its shard (see
:mod:`~lightning_mics.techniques.matrix_owners`). Yet ``.grad`` is a DTensor with the values that anybody else expects:

- What treats all elements alike works on the rows where they are, without communication: norms, as in clipping, their
  scaling, clamping and zeroing.
- Anything else first moves the rows to their shards. DTensor's operations, and code of users, find these by the
  attribute ``_local_tensor``, which moves them here when it is read. As for other collectives of DTensors, such as
  ``full_tensor()``, all ranks do it.

The optimizer takes rows from either place; from shards they cost their bytes once more. Momentum is such a tensor too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._ops._math_ops import _NormPartial


class OwnedRows(DTensor):
    """A tensor of the shape of a sharded parameter, with its rows on other ranks. Made by :func:`owned_rows`."""

    _held: Tensor | None  # rows that this rank holds: [held, columns]; None once they are in shards
    _shard: Tensor | None  # rows in this rank's shard: [own, columns]
    _to_shard: Callable[[Tensor], Tensor]

    @property
    def _local_tensor(self) -> Tensor:
        if self._shard is None:
            assert self._held is not None
            self._shard, self._held = self._to_shard(self._held), None
        return self._shard

    @_local_tensor.setter
    def _local_tensor(self, value: Tensor) -> None:
        self._shard, self._held = value, None

    @property
    def held(self) -> Tensor | None:
        """Rows that this rank holds for the owner, [held, columns]; None if they have been moved to shards."""
        return self._held

    def by_rows(self) -> DTensor:
        """The same values as a plain DTensor, sharded by rows; every rank calls it. The rows stay where they are."""
        local = self._local_tensor if self._held is None else self._to_shard(self._held)
        by_rows: DTensor = _made(DTensor, local, self._spec)
        return by_rows

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        """A description without values, which ranks would have to move."""
        where = "" if self._held is None else ", rows with their owner"
        return f"DTensor(shape={tuple(self.shape)}, placements={self.placements}{where})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the rows where they are if it treats all elements alike; otherwise on shards."""
        options = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            first = args[0] if args else None
            if isinstance(first, OwnedRows) and first._held is not None:
                if func in IN_PLACE and not any(isinstance(value, Tensor) and value.dim() for value in args[1:]):
                    func(first._held, *map(_whole_number, args[1:]), **options)
                    return first
                if func in NORMS and (norm := _norm(first, *args[1:], **options)) is not None:
                    return norm
                if func in UNCHANGED:
                    return first
            return func(*args, **options)


IN_PLACE = {Tensor.mul_, Tensor.div_, Tensor.clamp_, Tensor.zero_}
NORMS = {torch.norm, Tensor.norm, torch.linalg.vector_norm, torch.linalg.norm}
UNCHANGED = {Tensor.detach, Tensor.detach_}


def owned_rows(like: Tensor, held: Tensor, to_shard: Callable[[Tensor], Tensor]) -> OwnedRows:
    """A tensor of the shape of a parameter whose rows holders hold.

    Args:
        like: The sharded parameter: [rows, columns].
        held: Rows that this rank holds: [held, columns].
        to_shard: Moves them, as ``to_shard(held)``: [held, columns] -> [own, columns], rows of this rank's shard; every
            rank calls it.
    """
    assert isinstance(like, DTensor)
    meta = TensorMeta(like.shape, like.stride(), held.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    tensor: OwnedRows = _made(OwnedRows, held, spec)
    tensor._held, tensor._shard, tensor._to_shard = held, None, to_shard
    return tensor


def elements_here(gradient: Tensor) -> Tensor:
    """The elements of a gradient that this rank has, to change or look at each by itself: [any]. Without communication.

    Args:
        gradient: Gradient, sharded or not: [any].
    """
    if isinstance(gradient, OwnedRows) and gradient.held is not None:
        return gradient.held
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


def _made(kind: Any, local: Tensor, spec: DTensorSpec) -> Any:
    return kind(local, spec, requires_grad=False)


def _norm(rows: OwnedRows, p: Any = 2, dim: Any = None, **options: Any) -> Tensor | None:
    """The norm of all elements, a part of which each rank has; None if another norm is asked for."""
    order = options.pop("ord", p)
    order = 2 if order in ("fro", None) else order
    if dim is not None or any(value is not None and value is not False for value in options.values()):
        return None
    assert rows._held is not None
    part = torch.linalg.vector_norm(rows._held, order) if rows._held.numel() else rows._held.new_zeros(())
    mesh = rows.device_mesh
    return DTensor.from_local(part, mesh, [_NormPartial(order)] * mesh.ndim, run_check=False)


def _whole_number(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
