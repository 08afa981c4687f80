"""Beyond the paper: communication once per optimizer step, for any number of micro-steps.

Parameters change once per optimizer step, but FSDP2 gathers them at every use, in the forward and backward of every
micro-step. Parameters can be cached from their first gather until the boundary, and gradients accumulated until then,
on two levels.

*On each node.* A node holds one copy, spread over its ranks: each rank caches its rail's slice, and later gathers stay
inside the node; gradients are reduced inside the node and accumulated there. Two nodes of two ranks with shards A B C
D, rank = 2 * node + local, as in :mod:`~lightning_mics.techniques.hierarchical`::

    cached by ranks 0, 2    [ A B ]    rail 0, one copy per node:     node 0 = ranks 0, 1 = [ A B | C D ]
    cached by ranks 1, 3    [ C D ]    rail 1                         node 1 = ranks 2, 3 = [ A B | C D ]

    micro-step        1               2               3        boundary
    gather       rail, node          node            node        node          in forward; in backward always node
    reduce            node           node            node     node, rail

A node then sends M(N-1)/N bytes of parameters and as much of gradients per step over N nodes, which is the least
possible, for any partition size. It costs each rank M/k bytes for cached parameters and M/k for gradients, with k ranks
on each node.

*On each rank.* Each rank caches all of the parameters and accumulates unsharded gradients, which costs it M bytes for
each of the two. Then hop 1 runs once per step inside nodes as well::

    cached by each rank     [ A B C D ]

    micro-step        1               2               3        boundary
    gather        all ranks           -               -           -            in backward never
    reduce            -               -               -       all ranks

Optimizer states stay sharded, so this takes less memory than DDP, where they are replicated. FSDP2 itself accumulates
unsharded gradients (``set_requires_gradient_sync``). It can leave parameters unsharded too, but then the module would
show unsharded parameters instead of its shards, and changes that users make between micro-steps would be lost; here the
shards are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_mics._torch.fsdp import ReusedUnshard, weights_version
from lightning_mics._torch.streams import SideStream, current_stream, has_streams, keep_for_current_stream
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.techniques.pending_gradients import PendingGradients


class ParameterCache:
    """The cached parameters of one parameter group: a block, or the root's own parameters.

    All ranks must come to the same decision, or their collectives would not match: see
    [Note: When cached weights are dropped].

    Args:
        version: Returns the version of the group's weights; it changes with every update that torch records.
    """

    def __init__(self, version: Callable[[], Hashable]) -> None:
        self._version = version
        self._cached_version: Hashable = None
        self._differs: Tensor | None = None  # [], bool: whether a shard differed from its part of the cache

    @property
    def usable(self) -> bool:
        """Whether parameters are cached, and torch has recorded no change of the weights since."""
        return self._cached_version is not None and self._cached_version == self._version()

    def mark_valid(self) -> None:
        """Mark the cache as valid for the current version of the weights."""
        self._cached_version = self._version()

    def drop(self) -> None:
        """Drop the cached parameters: the next use gathers them."""
        self._cached_version = None

    def tensors(self) -> list[Tensor]:
        """Cached tensors in memory now, each [any]."""
        raise NotImplementedError

    def compare(self, own: Tensor, shard: Tensor) -> None:
        """Record whether this rank's part of the cache still equals its shard; does not wait for a device.

        Args:
            own: This rank's part of the cached parameters: [shard].
            shard: This rank's shard now: [shard].
        """
        if has_streams(own.device):
            differs = _bits_differ(own, shard)
            if self._differs is not None:
                keep_for_current_stream(self._differs)  # it may have been made on another one
                differs = differs | self._differs  # not in place: either may be a tensor of inference mode
            self._differs = differs
        elif not torch.equal(own, shard) and _bits_differ(own, shard):
            self._differs = torch.tensor(True)

    def take_differs(self) -> Tensor | None:
        """Return whether the cache was used after its shard had changed, [], and reset it; None if it never was."""
        differs, self._differs = self._differs, None
        if differs is not None:
            keep_for_current_stream(differs)
        return differs


class NodeCache(ParameterCache, HierarchicalAllGather):
    """All-gather whose inter-node stage runs only if this rank's rail slice is not cached.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        module: FSDP module of the parameter group.
        first_stage: Stream of the first stage; see :class:`~lightning_mics.techniques.hierarchical.TwoStages`.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        module: FSDPModule,
        first_stage: SideStream | None = None,
    ) -> None:
        ParameterCache.__init__(self, lambda: weights_version(module))
        HierarchicalAllGather.__init__(self, rail=rail, node=node, first_stage=first_stage)
        self._rail_slice: Tensor | None = None  # [nodes * shard]
        self._gathered: Any = None  # event after the stage along the rail

    @property
    def is_cached(self) -> bool:
        """Whether the next call runs inside the node only."""
        return self._rail_slice is not None and self.usable

    def __call__(
        self,
        output_tensor: Tensor,  # [local ranks * nodes * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail)."""
        device, cached = output_tensor.device, self._rail_slice
        if cached is not None and self.usable:
            current_stream(device).wait_event(self._gathered)  # it may have been another one's that waited for it
            self.compare(cached.chunk(self.rail.size)[self.rail.rank], input_tensor)
            work = self._spread(cached, output_tensor, async_op=async_op)
        else:
            with self.first_stage.after(self.filled_on(output_tensor), device):
                cached = torch.empty_like(self.rail_slice(output_tensor, group))
                self.rail.all_gather(cached, input_tensor, technique="gather along rails")
                self._rail_slice, self._gathered = cached, self.first_stage.record()
                self.mark_valid()
                if async_op:
                    work = self._spread(cached, output_tensor, async_op=True) or self.first_stage.work(device)
            if not async_op:
                current_stream(device).wait_event(self._gathered)
                work = self._spread(cached, output_tensor, async_op=False)
        keep_for_current_stream(cached)  # freed, its memory goes back to the stream of the rail
        return work

    def _spread(self, cached: Tensor, output: Tensor, *, async_op: bool) -> dist.Work | None:
        """Give the node this rank's slice, [nodes * shard]: the second stage, on the current stream."""
        if self.node is None:
            output.copy_(cached)
            return None
        return self.node.all_gather(output, cached, technique="gather inside nodes", async_op=async_op)

    @override
    def tensors(self) -> list[Tensor]:
        """The rail's slice, [nodes * shard], if it is cached."""
        return [] if self._rail_slice is None else [self._rail_slice]

    @override
    def drop(self) -> None:
        """Drop the rail's slice: the next gather runs its inter-node stage."""
        super().drop()
        self._rail_slice = None


class NodeReduceScatter(HierarchicalReduceScatter):
    """Reduce-scatter inside the node in every micro-step; along the rail at the boundary only.

    Before the boundary the output is zeros, and ``pending_gradients`` holds this rail's slice of the node's sum,
    [nodes * shard]: see [Note: Zero gradients before the boundary].

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        pending_gradients: Pending gradients of the parameter group.
        first_stage: Stream of the first stage; see :class:`~lightning_mics.techniques.hierarchical.TwoStages`.
        wire_dtype: Dtype of inter-node messages; None is the dtype of the sums.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        pending_gradients: PendingGradients,
        first_stage: SideStream | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rail=rail, node=node, first_stage=first_stage, wire_dtype=wire_dtype)
        self._pending_gradients = pending_gradients

    def __call__(
        self,
        output_tensor: Tensor,  # [shard]
        input_tensor: Tensor,  # [local ranks * nodes * shard], overwritten
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce ``input_tensor`` over the node; at the boundary leave the window's shard in ``output_tensor``."""
        rail_slice = self.reduce_in_node(input_tensor, group, op)
        if not self._pending_gradients.at_boundary:
            self._pending_gradients.accumulate(rail_slice)
            output_tensor.zero_()
            return None
        self._pending_gradients.add_into(rail_slice)
        return self.reduce_along_rail(output_tensor, rail_slice, op, async_op=async_op)


class RankCache(ParameterCache):
    """The unsharded parameters of one parameter group, which stay in memory between uses.

    Args:
        module: FSDP module of the parameter group.
    """

    def __init__(self, module: FSDPModule) -> None:
        super().__init__(lambda: weights_version(module))
        self._unsharded = ReusedUnshard(module, reuse=self._reuse, unsharded=self.mark_valid)

    @override
    def tensors(self) -> list[Tensor]:
        """Memory of the unsharded parameters, each [ranks * shard], if they are cached."""
        return self._unsharded.tensors() if self.usable else []

    @override
    def drop(self) -> None:
        """Free the unsharded parameters, or let FSDP2 do so after their use: the next use gathers them."""
        super().drop()
        self._unsharded.free()

    def _reuse(self, *, in_forward: bool) -> bool:
        if not self.usable:
            return False
        if in_forward:  # a backward uses the weights of its forward, even if they have changed since
            for own, shard in self._unsharded.own_parts():
                self.compare(own, shard)
        return True


def _bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether two tensors of the same shape, [any], differ in any bit: [], bool. NaN equals itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size(), torch.uint8)
    return (one.view(bits) != other.view(bits)).any()
