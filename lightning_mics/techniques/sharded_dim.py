"""Beyond the paper: which dim of a parameter is sharded. FSDP2 shards rows, and pads them to a multiple of the ranks.

A parameter with fewer rows than ranks, such as a matrix ``[r, inputs]`` of an adapter, would be padded to as many rows
as a partition group has ranks. Its longest dim that divides by the ranks is sharded instead, without padding. Four
ranks, and two rows of eight elements::

    by rows       [ row 0 | row 1 | padding | padding ]     16 elements become 32
    by columns    [ 0, 1 | 2, 3 | 4, 5 | 6, 7 ]             of both rows on each rank

FSDP2 shards other dims than the first only where they divide. Where none does, rows are sharded as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def sharded_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim of a parameter that is sharded: 0, unless rows are fewer than ranks and another dim divides by these.

    Args:
        shape: Size of the parameter, one number per dim.
        ranks: Ranks per partition group.
    """
    if not 0 < shape[0] < ranks:
        return 0
    even = [dim for dim, size in enumerate(shape) if dim and size and size % ranks == 0]
    return max(even, key=lambda dim: shape[dim], default=0)


def padded_numel(shape: Sequence[int], ranks: int) -> int:
    """Number of elements of a parameter, padded so that ``ranks`` have equal shards.

    Args:
        shape: Size of the parameter, one number per dim.
        ranks: Ranks per partition group.
    """
    if sharded_dim(shape, ranks):
        return prod(shape)
    return -(-shape[0] // ranks) * ranks * prod(shape[1:])
