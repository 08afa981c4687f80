"""One axis of a DTensor gathered or reduced by the collectives of its process group.

``redistribute`` of DTensor does the same for any pair of placements, and takes several times as long on the host: it
plans, and its collectives are functional ones. Here are the three pairs that direct use consists of::

    Shard   -> Replicate    [rows/p, columns] -- all-gather -----> [rows, columns]
    Partial -> Shard        [rows, columns] ---- reduce-scatter -> [rows/p, columns]
    Partial -> Replicate    [any] -------------- all-reduce -----> [any]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import Partial, Placement, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._redistribute import redistribute_local_tensor

from lightning_mics._torch.process_groups import all_gather_single, reduce_scatter_single


@torch.no_grad()
def along_axis(local: Tensor, spec: DTensorSpec, axis: int, placements: Sequence[Placement], to: Placement) -> Tensor:
    """Local values with the placement ``to`` along one axis of a mesh; all ranks along the axis call it.

    Args:
        local: Local values of this rank: [any].
        spec: Mesh and whole shape.
        axis: Axis of the mesh.
        placements: Placements of ``local``, one for each axis of the mesh.
        to: New placement along ``axis``.

    Returns:
        New values, [any], or ``local`` itself where there is nothing to do.
    """
    before = placements[axis]
    if before == to:
        return local
    if not _is_plain(local, [*placements, to]) or not (before.is_partial() or to.is_replicate()):
        return _redistributed(local, spec, axis, placements, to)
    group = spec.mesh.get_group(axis)
    if group.size() == 1:
        return local
    if isinstance(to, Shard):
        return _reduce_scatter(local, to.dim, group)
    if isinstance(before, Shard):
        return _all_gather(local, spec.shape[before.dim], before.dim, group)
    result = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _is_plain(local: Tensor, placements: Sequence[Placement]) -> bool:
    """Whether a tensor is no compiler's or rehearsal's, which look for functional collectives, and all is as in FSDP2:
    sums, and shards along one axis.
    """
    others = [each for each in placements if not each.is_replicate() and not _is_sum(each)]
    return type(local) is Tensor and len(others) <= 1 and all(type(each) is Shard for each in others)


def _is_sum(placement: Placement) -> bool:
    return type(placement) is Partial and placement.reduce_op == "sum"  # not one of a norm, which is a Partial too


def _all_gather(local: Tensor, size: int, dim: int, group: dist.ProcessGroup) -> Tensor:
    """All shards of a dimension of ``size``, of which the last ones may be smaller or empty."""
    shard, part = local.movedim(dim, 0), -(-size // group.size())
    gathered = local.new_empty(group.size() * part, *shard.shape[1:])
    all_gather_single(gathered, _padded(shard, part), group=group)
    return gathered[:size].movedim(0, dim).contiguous()


def _reduce_scatter(local: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of the sum over the ranks."""
    values = local.movedim(dim, 0)
    part = -(-len(values) // group.size())
    shard = local.new_empty(part, *values.shape[1:])
    reduce_scatter_single(shard, _padded(values, group.size() * part), group=group)
    own = min(part, max(0, len(values) - group.rank() * part))
    return shard[:own].movedim(0, dim).contiguous()


def _padded(values: Tensor, rows: int) -> Tensor:
    if len(values) == rows:
        return values.contiguous()
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: len(values)] = values
    return padded


def _redistributed(
    local: Tensor, spec: DTensorSpec, axis: int, placements: Sequence[Placement], to: Placement
) -> Tensor:
    after = [*placements[:axis], to, *placements[axis + 1 :]]
    specs = [DTensorSpec(spec.mesh, tuple(each), tensor_meta=spec.tensor_meta) for each in (placements, after)]
    result = redistribute_local_tensor(local, *specs)
    return result.wait() if isinstance(result, AsyncCollectiveTensor) else result
