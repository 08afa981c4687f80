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

from collections.abc import Callable, Hashable, Sequence
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
from lightning_mics.techniques.inter_node_prefetch import FetchedSlice, UnitPrefetch
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
        self._compared: Any = None  # event after it was computed

    @property
    def usable(self) -> bool:
        """Whether parameters are cached, and torch has recorded no change of the weights since."""
        return self._cached_version is not None and self._cached_version == self._version()

    def mark_valid(self) -> None:
        """Mark the cache as valid for the current version of the weights."""
        self._cached_version = self._version()

    def drop(self) -> None:
        """Drop the cached parameters: the next use gathers them, into the same memory where there is some."""
        self._cached_version = None

    def free(self) -> None:
        """Drop the cached parameters, and free their memory."""
        self.drop()

    def tensors(self) -> list[Tensor]:
        """Memory that the cache has now, each [any]."""
        raise NotImplementedError

    def compare(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Record whether this rank's part of the cache still equals its shards; does not wait for a device.

        Comparisons on any stream add to the same flag, one after the other.

        Args:
            parts: This rank's part of each cached tensor, [shard], and the shard now, [shard].
        """
        device = parts[0][0].device
        if not has_streams(device):
            if not all(torch.equal(*pair) for pair in parts) and _bits_differ(parts):  # NaN is unequal to itself
                self._differs = torch.tensor(True)
            return
        differs, here = _bits_differ(parts), current_stream(device)
        if self._differs is not None:  # not in place: the first one may be of an evaluation in inference mode
            here.wait_event(self._compared)
            keep_for_current_stream(self._differs)
            differs = self._differs | differs
        self._differs, self._compared = differs, here.record_event()

    def take_differs(self) -> Tensor | None:
        """Return whether the cache was used after its shard had changed, [], and reset it; None if it never was.

        The flag is ready on the current stream.
        """
        differs, self._differs = self._differs, None
        if differs is not None and has_streams(differs.device):
            current_stream(differs.device).wait_event(self._compared)
            keep_for_current_stream(differs)  # it is dropped once it has been read there
        return differs


class NodeCache(ParameterCache, HierarchicalAllGather):
    """All-gather whose inter-node stage runs only if this rank's rail slice is not cached.

    The slice is allocated once, on the stream of the rail: freed memory of that stream would serve nothing else.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        module: FSDP module of the parameter group.
        first_stage: Stream of the first stage; see :class:`~lightning_mics.techniques.hierarchical.TwoStages`.
        prefetch: Prefetch of the unit, which may have filled the cache before; None where there is none.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        module: FSDPModule,
        first_stage: SideStream | None = None,
        prefetch: UnitPrefetch | None = None,
    ) -> None:
        ParameterCache.__init__(self, lambda: weights_version(module))
        HierarchicalAllGather.__init__(self, rail=rail, node=node, first_stage=first_stage, prefetch=prefetch)
        if prefetch is not None:
            prefetch.cached, prefetch.memory = lambda: self.is_cached, self._memory_to_fetch
        self._rail_slice: Tensor | None = None  # [nodes * shard]
        self._gathered: Any = None  # event after the stage along the rail
        self._spread_out: Any = None  # event after the last use

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
        fetched = None if self.prefetch is None else self.prefetch.take()
        if cached is not None and self.usable:
            current_stream(device).wait_event(self._gathered)  # it may have been another one's that waited for it
            self.compare([(cached.chunk(self.rail.size)[self.rail.rank], input_tensor)])
            self._fetch_next(output_tensor)
            work = self._spread(cached, output_tensor, async_op=async_op)
        else:
            with self.first_stage.after(self.filled_on(output_tensor), device):
                if fetched is None:
                    rail_slice = self.rail_slice(output_tensor, group)
                    cached = self._memory(rail_slice.numel(), rail_slice.dtype, device)
                    self.rail.all_gather(cached, input_tensor, technique="gather along rails")
                else:
                    fetched.wait()
                    cached = fetched.values
                self._rail_slice, self._gathered = cached, self.first_stage.record()
                self.mark_valid()
                if async_op:
                    work = self._spread(cached, output_tensor, async_op=True) or self.first_stage.work(device)
            self._fetch_next(output_tensor)
            if not async_op:
                current_stream(device).wait_event(self._gathered)
                work = self._spread(cached, output_tensor, async_op=False)
        keep_for_current_stream(cached)  # freed, its memory goes back to the stream of the rail
        self._spread_out = current_stream(device).record_event()
        return work

    def _memory(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the rail's slice, [nodes * shard]: what an earlier gather has filled, after its last use."""
        memory = self._rail_slice
        if memory is None or memory.numel() != numel or memory.dtype != dtype:
            with torch.inference_mode(False):  # after an evaluation it may be filled in training
                return torch.empty(numel, dtype=dtype, device=device)
        current_stream(device).wait_event(self._spread_out)
        return memory

    def _memory_to_fetch(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same, for a slice that becomes the cache when it is used; if it is dropped, its memory is with it."""
        memory = self._memory(numel, dtype, device)
        self.drop()
        self._rail_slice = None
        return memory

    @override
    def _whole(self) -> FetchedSlice | None:
        return None  # the cache stays as it is

    def _spread(self, cached: Tensor, output: Tensor, *, async_op: bool) -> dist.Work | None:
        """Give the node this rank's slice, [nodes * shard]: the second stage, on the current stream."""
        if self.node is None:
            output.copy_(cached)
            return None
        return self.node.all_gather(output, cached, technique="gather inside nodes", async_op=async_op)

    @override
    def tensors(self) -> list[Tensor]:
        """Memory of the rail's slice, [nodes * shard], once there is some."""
        return [] if self._rail_slice is None else [self._rail_slice]

    @override
    def free(self) -> None:
        """Drop the rail's slice, and free its memory."""
        super().free()
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
            self.compare(self._unsharded.own_parts())
        return True


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element in bytes


@torch.no_grad()
def _bits_differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether the tensors of any pair differ in any bit: [], bool. NaN equals itself.

    The number of operations does not grow with the number of pairs.

    Args:
        pairs: Flat tensors, each two of the same size and dtype: [any].
    """
    bits = BITS.get(min(one.element_size() for one, _ in pairs), torch.int64)
    ones, others = zip(*((one.view(bits), other.view(bits)) for one, other in pairs), strict=True)
    one, other = ones[0], others[0]
    if len(pairs) > 1:
        sizes = [each.numel() for each in ones]
        one, other = one.new_empty(2, sum(sizes))
        torch._foreach_copy_([*one.split(sizes), *other.split(sizes)], [*ones, *others])
    differs: Tensor = (one != other).any()
    return differs
