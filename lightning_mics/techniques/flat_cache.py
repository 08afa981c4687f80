"""Beyond the paper: parameters cached on nodes where collectives are flat, gathered between nodes once per step.

The first gather runs in one stage over all ranks. Of its result each rank keeps a slice, as many shards as there are
nodes, so that a node holds one copy; later gathers stay inside the node. Two nodes of two ranks with shards A B C D, in
the order of ranks, as in :mod:`~lightning_mics.techniques.partition_groups`::

    kept by ranks 0, 2    [ A B ]              node 0 = ranks 0, 1 = [ A B | C D ]
    kept by ranks 1, 3    [ C D ]              node 1 = ranks 2, 3 = [ A B | C D ]

    micro-step      1           2           3       boundary
    gather      all ranks      node        node        node       in forward; in backward always node
    reduce      all ranks   all ranks   all ranks   all ranks

With one micro-step that is FSDP2's ``reshard_after_forward`` with the ranks of a node. On fast networks one flat ring
is as fast as two stages, or a little faster. Sums cannot wait on nodes likewise, as a rank's slice is not of the shards
along its rail: see :mod:`~lightning_mics.techniques.once_per_step` for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_mics._torch.streams import SideStream, current_stream, has_streams, keep_for_current_stream
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.techniques.flat import FlatAllGather
from lightning_mics.techniques.parameter_cache import NodeSlice, between


class FlatNodeCache(NodeSlice, FlatAllGather):
    """All-gather over the partition group where this rank's slice is not cached, and inside the node where it is.

    Args:
        partition: The ranks of the partition group, in ascending order.
        node: Those on this node, in ascending order.
        module: FSDP module of the parameter group.
        beside: Stream of asynchronous gathers, which all parameter groups of a model share; None makes a new one.
    """

    def __init__(
        self, *, partition: CountedGroup, node: CountedGroup, module: FSDPModule, beside: SideStream | None = None
    ) -> None:
        NodeSlice.__init__(self, module)
        FlatAllGather.__init__(self, partition)
        self._node = node
        self._nodes = partition.size // node.size
        self._beside = beside or SideStream()
        self._slice: Tensor | None = None  # [nodes * shard]
        self._used: Any = None  # event after the last use of the slice

    @property
    @override
    def _kept(self) -> Tensor | None:
        return self._slice

    def __call__(
        self,
        output_tensor: Tensor,  # [ranks * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group``.

        With ``async_op`` on a device with streams the current one waits for nothing, and the returned work covers all.
        """
        device = output_tensor.device
        if not (async_op and has_streams(device)):
            self._gather(output_tensor, input_tensor, group)
            return None
        with self._beside.after(current_stream(device), device):
            self._gather(output_tensor, input_tensor, group)
            return self._beside.work(device)

    @override
    def gather_some(self, output: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
        FlatAllGather.__call__(self, output, shard, group)  # the cache stays as it is

    def _gather(self, output: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
        here = current_stream(output.device)
        if self._used is not None:
            here.wait_event(self._used)
        stale = self._stale_parts(shard, nodes=self._nodes)
        if stale == [(0, shard.numel())]:
            FlatAllGather.__call__(self, output, shard, group)
            self._keep(output.chunk(self._node.size)[self._node.rank])
        else:
            self._gather_from_node(output, shard, stale)
        if stale:
            self.mark_valid()
        assert self._slice is not None
        keep_for_current_stream(self._slice)  # freed, its memory goes back to the stream that it was allocated on
        self._used = here.record_event()

    def _keep(self, part: Tensor) -> None:
        """Copy this rank's part of the unsharded parameters, [nodes * shard], into the slice."""
        kept = self._slice
        if kept is None or kept.numel() != part.numel() or kept.dtype != part.dtype:
            with torch.inference_mode(False):  # after an evaluation it may be filled in training
                self._slice = kept = torch.empty_like(part)
        kept.copy_(part)

    def _gather_from_node(self, output: Tensor, shard: Tensor, stale: Sequence[tuple[int, int]]) -> None:
        """Gather stale parts of the shards over all ranks, then all inside the node, and compare what was cached."""
        kept, own = self._slice, shard.clone()  # `shard` is a part of `output`
        assert kept is not None
        if stale:
            self._gather_parts(kept, own, stale)
        self._node.all_gather(output, kept, technique="gather inside nodes")
        cached = output.chunk(self._partition.size)[self._partition.rank]
        parts = [(cached[begin:end], own[begin:end]) for begin, end in between(stale, own.numel()) if begin < end]
        if parts:
            self.compare(parts)

    def _gather_parts(self, kept: Tensor, own: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Gather parts of the shards, [shard], over all ranks, and those of this rank's slice into it."""
        changed = torch.cat([own[begin:end] for begin, end in parts])
        gathered = changed.new_empty(self._partition.size * changed.numel())
        self._partition.all_gather(gathered, changed, technique="gather in partition groups")
        mine = gathered.chunk(self._node.size)[self._node.rank]
        self._fill(kept, mine, parts, nodes=self._nodes)

    @override
    def free(self) -> None:
        """Drop the slice, and free its memory."""
        super().free()
        self._slice = None
