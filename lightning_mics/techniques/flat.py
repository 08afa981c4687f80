"""The baseline: one collective over all ranks of the partition group, without stages: FSDP2's own, counted.

So FSDP2's options of its collectives hold: symmetric memory, memory of the process group, and a group of its own for
reductions, which FSDP2 hands over as ``group``.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from lightning_mics._torch.units.own_collectives import OwnAllGather, OwnReduceScatter
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp


class FlatAllGather(OwnAllGather):
    """All-gather over all ranks of the partition group in one stage."""

    def __init__(self, partition: CountedGroup) -> None:
        super().__init__()
        self._partition = partition

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [ranks * shard]
        input_tensor: torch.Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._partition.all_gather(
            output_tensor,
            input_tensor,
            technique="gather in partition groups",
            async_op=async_op,
            run=partial(self.own, group=group),
        )

    def gather_some(self, output: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Gather some of the parameters: [shard] -> [ranks * shard].

        Args:
            output: Memory of the result: [ranks * shard].
            shard: This rank's shards of the parameters, side by side: [shard].
            group: Partition group.
        """
        self(output, shard, group)


class FlatReduceScatter(OwnReduceScatter):
    """Reduce-scatter over all ranks of the partition group in one stage."""

    def __init__(self, partition: CountedGroup) -> None:
        super().__init__()
        self._partition = partition

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [shard]
        input_tensor: torch.Tensor,  # [ranks * shard]
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._partition.reduce_scatter(
            output_tensor,
            input_tensor,
            op=op,
            technique="reduce in partition groups",
            async_op=async_op,
            run=partial(self.own, group=group),
        )
