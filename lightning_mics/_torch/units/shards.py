"""Where the ranks' shards are in an unsharded parameter: one after the other, or side by side along another dim.

::

    sharded dim 0    [ shard 0 ]       sharded dim 1    [ shard 0 | shard 1 ]
                     [ shard 1 ]
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam


def shards_in(memory: Tensor, parameter: FSDPParam, *, ranks: int) -> Tensor:
    """The memory of an unsharded parameter as its shards: a view, [ranks, shard], of which a shard may be strided.

    Args:
        memory: Memory that FSDP2 has gathered the parameter into: [ranks * shard].
        parameter: FSDP2's record of the parameter.
        ranks: Ranks that hold the shards.
    """
    dim = parameter.fsdp_placement.dim
    if dim == 0:
        return memory.view(ranks, -1)
    shard = parameter.padded_sharded_param_size
    return memory.view(*shard[:dim], ranks, *shard[dim:]).movedim(dim, 0)


def own_shard(unsharded: Tensor, parameter: FSDPParam) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, [any], without padding: a view, [shard].

    Args:
        unsharded: Values of the parameter, or of its gradient: [any].
        parameter: FSDP2's record of the parameter.
    """
    dim, mesh_info = parameter.fsdp_placement.dim, parameter.mesh_info
    count = parameter.sharded_size[dim]
    start = mesh_info.shard_mesh_rank * parameter.padded_sharded_param_size[dim]
    return unsharded.narrow(dim, min(start, unsharded.size(dim) - count), count)
