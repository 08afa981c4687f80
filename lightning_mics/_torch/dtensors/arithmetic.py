"""Arithmetic that an optimizer does for each parameter: on this rank's part at once.

For a scalar operand DTensor leaves its fast path, and takes five times as long as the operation itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from lightning_mics._torch.dtensors.views import is_ours

aten = torch.ops.aten

CHANGES = (aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor)
ARITHMETIC = (*CHANGES, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)

_dtensor: Any = DTensor


def on_own_part(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an elementwise operation on a sharded tensor and a number, or on two sharded alike, without communication.

    Args:
        operation: One of ``ARITHMETIC``.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The result, sharded as the operands are; ``NotImplemented`` for other operands.
    """
    if type(args[0]) is not DTensor or not is_ours(args[0]):
        return NotImplemented
    tensor, other = args[0], args[1]
    spec = tensor._spec
    if isinstance(other, DTensor):
        if type(other) is not DTensor or not is_alike(spec, other._spec):
            return NotImplemented
        other = other._local_tensor
    elif isinstance(other, Tensor) and other.ndim:
        return NotImplemented
    result = operation(tensor._local_tensor, other, **kwargs)
    if operation in CHANGES:
        return tensor
    if result.dtype != tensor.dtype:
        meta = TensorMeta(spec.shape, spec.stride, result.dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    return _dtensor(result, spec, requires_grad=False)


def is_alike(spec: DTensorSpec, other: DTensorSpec) -> bool:
    """Whether two tensors have their shards at the same places.

    Args:
        spec: Shape and sharding of the one.
        other: Those of the other.
    """
    return spec.mesh is other.mesh and spec.placements == other.placements and spec.shape == other.shape
