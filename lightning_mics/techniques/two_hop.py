"""Technique 3: two-hop gradient synchronisation. What is reduced in a micro-step, and what waits for the boundary.

MiCS, section 3.4. Hop 1, every micro-step: reduce-scatter inside the partition group; each rank adds up its shard.
Hop 2, at the boundary only: all-reduce of that sum over the replication group::

    micro-step      1    2    3    4 = boundary
    hop 1           RS   RS   RS   RS             inside each partition group
    hop 2                          AR             over the replication groups

FSDP2 runs both hops and keeps the sums in the reduce dtype; this module tells it when the second is due. The steps from
one boundary to the next are an accumulation window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.pending_gradients import PendingGradients


class SecondHop:
    """Hop 2 in a dtype of its own on the wire, where FSDP2 would all-reduce in the dtype of the sums.

    Args:
        replication: The ranks that hold the same part.
        wire_dtype: What travels; sums stay in the dtype of the gradients.
        pending_gradients: What the unit keeps back, and whether this is the boundary.
        after_sums: Whether the first hop keeps its sums back already, and hands on zeros before the boundary.
    """

    def __init__(
        self,
        *,
        replication: CountedGroup,
        wire_dtype: torch.dtype,
        pending_gradients: PendingGradients,
        after_sums: bool,
    ) -> None:
        self._replication = replication
        self._wire_dtype = wire_dtype
        self._pending_gradients_of = pending_gradients
        self._after_sums = after_sums

    def __call__(self, shard: Tensor, op: ReduceOp) -> None:
        """Reduce the ``shard`` that hop 1 has left, in place; before the boundary keep it back and leave zeros."""
        if shard.is_cuda:  # FSDP2 frees it after this, while its own stream still reads it
            shard.record_stream(torch.cuda.current_stream(shard.device))
        if self._pending_gradients_of.at_boundary:
            if not self._after_sums:
                self._pending_gradients_of.add_into(shard)
            self._replication.all_reduce(
                shard, op=op, technique="all-reduce over replicas", wire_dtype=self._wire_dtype
            )
        elif not self._after_sums:
            self._pending_gradients_of.accumulate(shard)
            shard.zero_()
