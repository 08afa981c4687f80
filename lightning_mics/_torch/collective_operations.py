"""The collectives among the operations that a dispatch mode sees: those of ``torch.distributed``, and of DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

_KINDS: dict[str, Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]] = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::broadcast_": "broadcast",
    "_dtensor::shard_dim_alltoall": "all_to_all",
}


@dataclass(frozen=True)
class CollectiveOperation:
    """One collective that an operation runs.

    Attributes:
        kind: Kind of the collective.
        group: Process group.
        tensors: Tensors that it takes.
        elements: Number of elements that are gathered, reduced or exchanged, over all ranks.
        sizes: Elements that each rank gets of this one, in an exchange of parts of different sizes; else empty.
    """

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
    group: dist.ProcessGroup
    tensors: list[Tensor]
    elements: int
    sizes: Sequence[int]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of messages."""
        return self.tensors[0].dtype


def collective_of(operation: Any, args: tuple[Any, ...]) -> CollectiveOperation | None:
    """The collective that an operation runs; None if it runs none over several ranks.

    Args:
        operation: Operation of ``torch.ops``.
        args: Positional arguments of the operation.
    """
    kind = _KINDS.get(operation._schema.name)
    group = group_of(operation, args) if kind is not None else None
    if kind is None or group is None or group.size() == 1:
        return None
    tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
    elements = max(tensor.numel() for tensor in tensors)
    if kind == "all_reduce":
        elements = sum(tensor.numel() for tensor in tensors)
    elif kind == "all_gather" and operation.namespace == "_c10d_functional":  # it makes the output itself
        elements *= group.size()
    sizes = args[4] if operation is torch.ops.c10d.alltoall_base_.default else ()
    return CollectiveOperation(kind, group, tensors, elements, sizes)


def group_of(operation: Any, args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """The process group of an operation that a dispatch mode has seen; None for one that has none.

    Args:
        operation: Operation of ``torch.ops``.
        args: Positional arguments of the operation.
    """
    if operation.namespace in ("_c10d_functional", "_dtensor"):
        names = [argument for argument in args if isinstance(argument, str)]
        return _resolve_process_group(names[-1]) if names else None  # type: ignore[arg-type]
    if operation.namespace != "c10d":
        return None
    objects = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    return next((dist.ProcessGroup.unbox(o) for o in objects if "ProcessGroup" in str(o._type())), None)
