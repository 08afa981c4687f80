"""Technique 2: hierarchical collectives. Cross the slow network with each byte once per rail, then spread inside nodes.

MiCS, section 3.3. Gathering M bytes over a partition group of p ranks, k on each node, flat brings (p-1)M/p bytes into
each node; in two stages it is (p-k)M/p, each foreign byte once. Two nodes of two ranks (rank = 2 * node + local), with
shards A B C D held by ranks 0 2 1 3, which is the order of the partition group, rail by rail::

    output     [ A B | C D ]     one slice per rail
    rank 0     [ A . | . . ]  stage 1, rail (0, 2)   [ A B | . . ]  stage 2, node (0, 1)   [ A B | C D ]
    rank 1     [ . . | C . ]  stage 1, rail (1, 3)   [ . . | C D ]  stage 2, node (0, 1)   [ A B | C D ]

What a rail gathers is one contiguous slice, so both stages work in place: no rearranging, no staging buffer (the paper
needs both). The reduce-scatter, which the paper leaves flat, is the mirror image: node first, then rail.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_mics._torch_compat import (
    AllGather,
    ReduceScatter,
    all_gather_single,
    backend_name,
    premultiplied_sum_factor,
    reduce_scatter_single,
)

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType


class _TwoStages:
    """What both directions share: their groups, and ordinary buffers for FSDP2, on whatever stream is current.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks.
    """

    def __init__(self, *, rail: dist.ProcessGroup, node: dist.ProcessGroup) -> None:
        self._rail = rail
        self._node = node

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _rail_slice(self, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """What this rank's rail holds of ``whole``: [nodes * shard]."""
        if group.size() != self._rail.size() * self._node.size():
            raise RuntimeError(
                f"called for a group of {group.size()} ranks, made for {self._rail.size()} nodes of {self._node.size()}"
            )
        return whole.chunk(self._node.size())[self._node.rank()]


class HierarchicalAllGather(_TwoStages, AllGather):
    """All-gather over a partition group in two stages, in place: along the rail, then inside the node."""

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [local ranks * nodes * shard]
        input_tensor: torch.Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail).

        Collectives are enqueued on the current stream, as FSDP2 expects of its own; with ``async_op`` the returned
        work covers the second stage, and the first is ordered before it on the current stream.
        """
        rail_slice = self._rail_slice(output_tensor, group)
        all_gather_single(rail_slice, input_tensor, group=self._rail)
        work: dist.Work | None = all_gather_single(output_tensor, rail_slice, group=self._node, async_op=async_op)
        return work


class HierarchicalReduceScatter(_TwoStages, ReduceScatter):
    """Reduce-scatter over a partition group in two stages: inside the node, then along the rail.

    The first stage leaves its result in place, in the slice of the input that belongs to this rank's rail.
    """

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [shard]
        input_tensor: torch.Tensor,  # [local ranks * nodes * shard], overwritten
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce ``input_tensor`` over ``group`` and leave this rank's shard in ``output_tensor``.

        An average is the average of averages, as all nodes have the same number of ranks; the factor of a
        pre-multiplied sum is applied by the first stage alone.
        """
        rail_slice = self._rail_slice(input_tensor, group)
        reduce_scatter(rail_slice, input_tensor, group=self._node, op=op)
        second_op = dist.ReduceOp.SUM if premultiplied_sum_factor(op) is not None else op
        return reduce_scatter(output_tensor, rail_slice, group=self._rail, op=second_op, async_op=async_op)


def reduce_scatter(
    output: torch.Tensor,  # [shard]; may be this rank's part of `source`
    source: torch.Tensor,  # [ranks * shard]
    *,
    group: dist.ProcessGroup,
    op: ReduceOp,
    async_op: bool = False,
) -> dist.Work | None:
    """Reduce-scatter by the backend's own collective; on gloo by an all-to-all and a local sum.

    gloo's reduce-scatter is an all-reduce inside and sends twice the bytes.
    """
    if backend_name(group, source.device) != "gloo":
        work: dist.Work | None = reduce_scatter_single(output, source, group=group, op=op, async_op=async_op)
        return work
    parts = torch.empty_like(source)
    dist.all_to_all_single(parts, source, group=group)
    _reduce_locally(parts.view(group.size(), -1), output, op=op)
    return None


def _reduce_locally(parts: torch.Tensor, output: torch.Tensor, *, op: ReduceOp) -> None:
    """Reduce ``parts`` [ranks, shard] into ``output`` [shard]."""
    factor = premultiplied_sum_factor(op)
    if factor is None and op == dist.ReduceOp.AVG:
        factor = 1 / parts.size(0)
    elif factor is None and op != dist.ReduceOp.SUM:
        raise ValueError(f"the hierarchical reduce-scatter takes SUM, AVG and PREMUL_SUM, got {op}")
    torch.sum(parts, dim=0, out=output)
    if factor is not None:
        output.mul_(factor)
