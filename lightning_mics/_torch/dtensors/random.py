"""Random numbers in sharded tensors on CPUs: those that one process would draw for the unsharded tensor.

DTensor draws from offsets of its own per shard on CUDA only. On CPUs each rank would draw the same numbers for its
shard. Here each draws those of the unsharded tensor and keeps its own rows: they are equal on replicas, as under DDP,
where the ranks' generators are, and initializations such as ``nn.init.xavier_uniform_`` are those of one process.

Initializations that work on matrices as a whole, such as ``nn.init.orthogonal_``, set the unsharded tensor, of which
each rank keeps its own rows, on all devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mics._torch.dtensors.views import run_default

aten = torch.ops.aten

IN_PLACE = (
    aten.normal_.default,
    aten.uniform_.default,
    aten.bernoulli_.float,
    aten.exponential_.default,
    aten.log_normal_.default,
    aten.cauchy_.default,
    aten.geometric_.default,
    aten.random_.default,
    aten.random_.to,
    getattr(aten.random_, "from"),
)
LIKE = (aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype)

OF_WHOLE = ("orthogonal_", "sparse_", "eye_", "dirac_")  # functions of `nn.init`

_meshes: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()


def draw_as_unsharded(mesh: DeviceMesh) -> None:
    """Draw random numbers of sharded tensors on ``mesh`` as for unsharded ones, on CUDA as DTensor does."""
    _meshes.add(mesh)
    for name in OF_WHOLE:
        function = getattr(nn.init, name)
        if not hasattr(function, "__wrapped__"):
            setattr(nn.init, name, _initializing_whole(function))
    if mesh.device_type != "cpu":
        return
    for operation in (*IN_PLACE, *LIKE):
        _handlers().setdefault(operation, _draw)


def _handlers() -> dict[Any, Any]:
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    return handlers  # type: ignore[no-any-return]


def _initializing_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def initialize(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(tensor, DTensor) or tensor.device_mesh not in _meshes:
            return function(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.to_local().device)
        function(whole, *args, **kwargs)
        with torch.no_grad():
            return tensor.copy_(_sharded(whole, tensor))

    return initialize


def _sharded(whole: Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _draw(operation: Any, args: Any, kwargs: Any) -> Any:
    target = args[0]
    if target._spec.mesh not in _meshes or any(placement.is_partial() for placement in target.placements):
        return run_default(operation, args, kwargs)
    drawn = operation(torch.empty(target.shape, dtype=target.dtype), *args[1:], **kwargs)
    own = _sharded(drawn, target)
    if operation not in IN_PLACE:
        return own
    target._local_tensor.copy_(own._local_tensor)
    return target
