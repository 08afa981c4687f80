"""Technique 3: two-hop gradient synchronization. Hop 1 runs in every micro-step, hop 2 at the boundary only.

MiCS, section 3.4. The *boundary* is the gradient accumulation boundary: the last micro-step before an optimizer step.
The micro-steps from one boundary to the next are an *accumulation window*. Hop 1, every micro-step: reduce-scatter
inside the partition group; each rank accumulates its shard. Hop 2, at the boundary only: all-reduce of that sum over
the replication group. Two partition groups of two ranks with shards A B::

                           hop 1: reduce-scatter          hop 2: all-reduce
    partition group 0      rank 0 [ A ]   rank 1 [ B ]      ranks 0, 2    A + A
    partition group 1      rank 2 [ A ]   rank 3 [ B ]      ranks 1, 3    B + B

    micro-step      1    2    3    4 = boundary
    hop 1           RS   RS   RS   RS             inside each partition group
    hop 2                          AR             over the replication groups

FSDP2 runs both hops and accumulates the sums in the reduce dtype;
:mod:`~lightning_mics.sharding.accumulation_window` sets when hop 2 runs. This module has hop 2 for messages with their
own dtype.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_mics._torch.streams import keep_for_current_stream
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.owner_exchange import OwnedReduction, factor_of_mean
from lightning_mics.techniques.pending_gradients import PendingGradients


class SecondHop:
    """Hop 2 of one parameter group, where it is not FSDP2's: messages have a dtype of their own, or matrices owners.

    Args:
        replication: The ranks that hold the same shard.
        wire_dtype: Dtype of the messages; sums stay in the dtype of the gradients. None is that dtype.
        pending_gradients: Pending gradients of the parameter group.
        hop_1_accumulates: Whether hop 1 accumulates into ``pending_gradients`` itself, and leaves zeros before the
            boundary.
        owned: Reduction at the boundary where some matrices have owners; None if none has.
        owned_by_hop_1: Whether hop 1 has reduced owned matrices already.
    """

    def __init__(
        self,
        *,
        replication: CountedGroup,
        wire_dtype: torch.dtype | None,
        pending_gradients: PendingGradients,
        hop_1_accumulates: bool,
        owned: OwnedReduction | None = None,
        owned_by_hop_1: bool = False,
    ) -> None:
        self._replication = replication
        self._wire_dtype = wire_dtype
        self._pending_gradients = pending_gradients
        self._hop_1_accumulates = hop_1_accumulates
        self._owned = owned
        self._owned_by_hop_1 = owned_by_hop_1

    def __call__(self, shard: Tensor, op: ReduceOp) -> None:
        """Reduce the result of hop 1 in place; before the boundary accumulate it, and leave zeros.

        See [Note: Zero gradients before the boundary].

        Args:
            shard: Result of hop 1: [shard].
            op: Sum or average over the replicas.
        """
        keep_for_current_stream(shard)  # FSDP2 frees it after this, while its own stream still reads it
        if self._pending_gradients.at_boundary:
            if not self._hop_1_accumulates:
                self._pending_gradients.add_into(shard)
            if self._owned is None:
                self._all_reduce(shard, op)
            elif self._owned_by_hop_1:
                self._owned.reduce_rest(shard, partial(self._all_reduce, op=op))
            else:
                self._owned(
                    shard.view(1, -1),
                    shard,
                    partial(self._all_reduce_into, op=op),
                    factor=factor_of_mean(op, ranks=self._replication.size, scaled=True),
                )
        elif not self._hop_1_accumulates:
            self._pending_gradients.accumulate(shard)
            shard.zero_()

    def _all_reduce(self, shard: Tensor, op: ReduceOp) -> None:
        self._replication.all_reduce(shard, op=op, technique="all-reduce over replicas", wire_dtype=self._wire_dtype)

    def _all_reduce_into(self, result: Tensor, shard: Tensor, op: ReduceOp) -> None:
        result.copy_(shard)
        self._all_reduce(result, op)
