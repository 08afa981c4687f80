"""How tensors in a checkpoint are sharded: read from those that are saved, and made again on the mesh of another job.

A tensor of a checkpoint is sharded along one dimension or whole. On a job's mesh, of axes (replicate, shard) or
(shard), a sharded one is divided over the last axis and replicated over the first. One that each position of the last
axis has for itself, of any size, is partial over it, and has another name in the checkpoint at each position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, empty

WHOLE = -1  # the dimension of a DTensor that is not sharded


def shard_dim(tensor: DTensor) -> int:
    """The dimension along which ``tensor`` is sharded, or :data:`WHOLE`."""
    dims = [placement.dim for placement in tensor.placements if isinstance(placement, Shard)]
    return dims[0] if dims else WHOLE


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, [rows, ...]; any other tensor, [any], as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settled(value: Any) -> Any:
    """A tensor that a checkpoint can hold: reduced if a reduction is pending, and sharded by one axis at most.

    Args:
        value: A DTensor, sharded in any way: every rank of its mesh calls this. Anything else is returned unchanged.

    Returns:
        A DTensor that is sharded along one axis of its mesh, or an unsharded tensor.
    """
    if not isinstance(value, DTensor):
        return value
    placements = tuple(Replicate() if placement.is_partial() else placement for placement in value.placements)
    if placements != tuple(value.placements):
        value = value.redistribute(value.device_mesh, placements)
    if shard_dim(value) == WHOLE:
        return value.to_local()
    sizes = value.device_mesh.shape
    sharded = sum(not placement.is_replicate() for placement in placements)
    replicated = sum(placement.is_replicate() and size > 1 for placement, size in zip(placements, sizes, strict=True))
    plain = all(type(placement) is Shard for placement in placements if not placement.is_replicate())
    return value if sharded == 1 and replicated <= 1 and plain else value.full_tensor()


def placed(whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """Shard a tensor that every rank has, without communication.

    Args:
        whole: Unsharded tensor, [any].
        mesh: Mesh of the job.
        dim: Dimension to shard along, or :data:`WHOLE`.
    """
    return distribute_tensor(whole, mesh, _placements(mesh, dim), src_data_rank=None)


def empty_placed(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh, dim: int) -> DTensor:
    """An uninitialized tensor to read into, on the mesh's devices.

    Args:
        size: Unsharded size.
        dtype: Dtype of the tensor.
        mesh: Mesh of the job.
        dim: Dimension to shard along, or :data:`WHOLE`.
    """
    return empty(*size, dtype=dtype, device_mesh=mesh, placements=_placements(mesh, dim))


def positional(own: Tensor, mesh: DeviceMesh) -> DTensor:
    """The tensor of this rank's position on the last axis of a mesh, replicated over the first.

    Args:
        own: Tensor, [any]; of another size at other positions.
        mesh: Mesh of the job.
    """
    placements = [*([Replicate()] * (mesh.ndim - 1)), Partial()]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=own.shape, stride=own.stride())


def _placements(mesh: DeviceMesh, dim: int) -> list[Any]:
    return [*([Replicate()] * (mesh.ndim - 1)), Replicate() if dim == WHOLE else Shard(dim)]
