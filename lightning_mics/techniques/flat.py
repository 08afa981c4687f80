"""The baseline: one collective over all ranks of the partition group, without stages."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_mics._torch.fsdp import AllGather, ReduceScatter
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp


class FlatAllGather(AllGather):
    """All-gather over all ranks of the partition group in one stage."""

    def __init__(self, partition: CountedGroup) -> None:
        self._partition = partition

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [ranks * shard]
        input_tensor: torch.Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._partition.all_gather(
            output_tensor, input_tensor, technique="gather in partition groups", async_op=async_op
        )


class FlatReduceScatter(ReduceScatter):
    """Reduce-scatter over all ranks of the partition group in one stage."""

    def __init__(self, partition: CountedGroup) -> None:
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
            output_tensor, input_tensor, op=op, technique="reduce in partition groups", async_op=async_op
        )
