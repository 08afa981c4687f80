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

*Frozen parameters* do not change at the boundary, and stay cached. Then what trains is gathered alone, by its segments
of the flat shards: A bytes of adapters cost a node 2A(N-1)/N bytes per step, for any size of the base model.

Optimizer states stay sharded, so this takes less memory than DDP, where they are replicated. FSDP2 itself accumulates
unsharded gradients (``set_requires_gradient_sync``). It can leave parameters unsharded too, but then the module would
show unsharded parameters instead of its shards, and changes that users make between micro-steps would be lost; here the
shards are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_mics._torch.fsdp import ReusedUnshard, trainable, weights_version
from lightning_mics._torch.streams import SideStream, current_stream, has_streams, keep_for_current_stream
from lightning_mics._torch.units.gather_inputs import gathered_segments
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.cache_offload import HeldOnHost
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.techniques.inter_node_prefetch import FetchedSlice, UnitPrefetch
from lightning_mics.techniques.owner_exchange import OwnedReduction, factor_of_mean
from lightning_mics.techniques.parameter_cache import NodeSlice, ParameterCache, between
from lightning_mics.techniques.pending_gradients import PendingGradients


class NodeCache(NodeSlice, HierarchicalAllGather):
    """All-gather whose inter-node stage runs only if this rank's rail slice is not cached.

    The slice is allocated once, on the stream of the rail: freed memory of that stream would serve nothing else. Or it
    waits on the host, and is on the device while it is given to the node
    (:mod:`~lightning_mics.techniques.cache_offload`).

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        module: FSDP module of the parameter group.
        first_stage: Stream of the first stage; see :class:`~lightning_mics.techniques.hierarchical.TwoStages`.
        prefetch: Prefetch of the unit, which may have filled the cache before; None where there is none.
        held: Place of the slice on the host; None leaves it on the device.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        module: FSDPModule,
        first_stage: SideStream | None = None,
        prefetch: UnitPrefetch | None = None,
        held: HeldOnHost | None = None,
    ) -> None:
        NodeSlice.__init__(self, module)
        HierarchicalAllGather.__init__(self, rail=rail, node=node, first_stage=first_stage, prefetch=prefetch)
        if prefetch is not None:
            prefetch.cached = lambda: self.gathered != "all"
            if held is None:
                prefetch.memory = self._memory_to_fetch
            else:
                prefetch.fetch_from_host = self._fetch_from_host
        self._held = held
        self._rail_slice: Tensor | None = None  # [nodes * shard], on the device for as long as it is used at least
        self._gathered: Any = None  # event after the stage along the rail, or the copy from the host
        self._spread_out: Any = None  # event after the last use

    @property
    @override
    def _kept(self) -> Tensor | None:
        """Memory of the rail's slice from one use to the next, on the device or on the host: [nodes * shard]."""
        return self._rail_slice if self._held is None else self._held.values

    def __call__(
        self,
        output_tensor: Tensor,  # [local ranks * nodes * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail)."""
        device = output_tensor.device
        fetched = None if self.prefetch is None else self.prefetch.take()
        stale = self._stale_parts(input_tensor, nodes=self.rail.size)
        if fetched is None and stale != [(0, input_tensor.numel())]:
            self._take_from_host()
        cached = self._rail_slice
        if cached is not None and len(stale) == 0:
            self._compare(cached, input_tensor, [(0, input_tensor.numel())])
            self._fetch_next(output_tensor)
            work = self._spread(cached, output_tensor, async_op=async_op)
        else:
            if cached is not None and fetched is None:
                self._compare(cached, input_tensor, between(stale, input_tensor.numel()))
            with self.first_stage.after(self.filled_on(output_tensor), device):
                if fetched is not None:
                    fetched.wait()
                    cached = fetched.values
                else:
                    rail_slice = self.rail_slice(output_tensor, group)
                    cached = self._memory(rail_slice.numel(), rail_slice.dtype, device)
                    self._gather_along_rail(cached, input_tensor, stale)
                self._rail_slice, self._gathered = cached, self.first_stage.record()
                if self._held is not None:
                    self._held.put(cached)
                self.mark_valid()
                if async_op:
                    work = self._spread(cached, output_tensor, async_op=True) or self.first_stage.work(device)
            self._fetch_next(output_tensor)
            if not async_op:
                current_stream(device).wait_event(self._gathered)
                work = self._spread(cached, output_tensor, async_op=False)
        if self._held is None or fetched is not None:
            keep_for_current_stream(cached)  # freed, its memory goes back to the stream of the rail
        self._spread_out = current_stream(device).record_event()
        with self.first_stage.entered(device) if async_op else nullcontext():
            self._leave_to_host()
        return work

    def _take_from_host(self) -> None:
        """Have the rail's slice on the device, if it waits on the host."""
        if self._held is not None and self._rail_slice is None and self._held.values is not None:
            self._rail_slice = self._held.take()
            self._gathered = current_stream(self._rail_slice.device).record_event()

    def _leave_to_host(self) -> None:
        if self._held is not None and self._rail_slice is not None:
            self._held.leave(self._rail_slice)
            self._rail_slice = None

    def _fetch_from_host(self) -> None:
        """Begin to copy the rail's slice to the device for its next use, if some of it is valid."""
        if self._held is not None and self.gathered != "all":
            self._held.fetch()

    def _compare(self, cached: Tensor, shard: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Compare this rank's part of the cache with its shard, where the cache is used as it is."""
        own = cached.chunk(self.rail.size)[self.rail.rank]
        kept = [(own[begin:end], shard[begin:end]) for begin, end in parts if begin < end]
        if kept:
            current_stream(shard.device).wait_event(self._gathered)  # it may have been another one's that waited for it
            self.compare(kept)

    def _gather_along_rail(self, cached: Tensor, shard: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Gather parts of the shards, [shard], along the rail into the rail's slice: [nodes * shard]."""
        if list(parts) == [(0, shard.numel())]:
            self.rail.all_gather(cached, shard, technique="gather along rails")
            return
        own = torch.cat([shard[begin:end] for begin, end in parts])
        gathered = own.new_empty(self.rail.size * own.numel())
        self.rail.all_gather(gathered, own, technique="gather along rails")
        self._fill(cached, gathered, parts, nodes=self.rail.size)

    def _memory(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the rail's slice, [nodes * shard]: what an earlier gather has filled, after its last use."""
        memory = self._rail_slice
        if self._held is not None and memory is None:
            return self._held.allocate((numel,), dtype=dtype, device=device)
        if memory is None or memory.numel() != numel or memory.dtype != dtype:
            with torch.inference_mode(False):  # after an evaluation it may be filled in training
                return torch.empty(numel, dtype=dtype, device=device)
        current_stream(device).wait_event(self._spread_out if self._held is None else self._gathered)
        return memory

    def _memory_to_fetch(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same, for a slice that becomes the cache when it is used; if it is dropped, its memory is with it."""
        memory = self._memory(numel, dtype, device)
        self.drop()
        self._rail_slice = None
        return memory

    def segment(self, index: int, like: Tensor) -> Tensor | None:
        """The rail's slice of one parameter, to be changed in place: [nodes, shard of the parameter], strided.

        :meth:`close_segments` ends the changes.

        Args:
            index: Position of the parameter in the group.
            like: The parameter's shard, [any], with the dtype that the slice must have.

        Returns:
            None where nothing valid is cached in this dtype.
        """
        cached = self._kept
        if cached is None or cached.dtype != like.dtype or not self.equals_before(index):
            return None
        segments = gathered_segments(self._module, cached.view(self.rail.size, -1)[0])
        if segments is None:
            return None
        self._take_from_host()
        cached = self._rail_slice
        assert cached is not None
        rows = cached.view(self.rail.size, -1)
        current_stream(cached.device).wait_event(self._gathered)
        begin, end = segments[index]
        return rows[:, begin:end]

    def close_segments(self) -> None:
        """End changes of segments: a slice that waits on the host goes back there."""
        if self._held is not None and self._rail_slice is not None:
            self._held.put(self._rail_slice)
            self._leave_to_host()

    @override
    def _whole(self) -> FetchedSlice | None:
        return None  # the cache stays as it is

    def _spread(self, cached: Tensor, output: Tensor, *, async_op: bool) -> dist.Work | None:
        """Give the node this rank's slice, [nodes * shard]: the second stage, on the current stream.

        Where the slice waits on the host an asynchronous one is on the stream of the rail, to know when it is over.
        """
        if async_op and self._held is not None and has_streams(output.device):
            with self.first_stage.after(current_stream(output.device), output.device):
                self._spread(cached, output, async_op=False)
                return self.first_stage.work(output.device)
        if self.node is None:
            output.copy_(cached)
            return None
        return self.node.all_gather(output, cached, technique="gather inside nodes", async_op=async_op)

    @override
    def free(self) -> None:
        """Drop the rail's slice, and free its memory."""
        super().free()
        self._rail_slice = None
        if self._held is not None:
            self._held.drop()


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

    Attributes:
        owned: Reduction at the boundary where some matrices have owners; None if none has.
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
        self.owned: OwnedReduction | None = None

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
        if self.owned is not None:
            factor = factor_of_mean(op, ranks=self.owned.nodes, scaled=self.node is not None)
            reduce_rest = partial(self.reduce_along_rail, op=op)
            self.owned(rail_slice.view(self.rail.size, -1), output_tensor, reduce_rest, factor=factor)
            return None
        return self.reduce_along_rail(output_tensor, rail_slice, op, async_op=async_op)


class RankCache(ParameterCache):
    """The unsharded parameters of one parameter group, which stay in memory between uses.

    Args:
        module: FSDP module of the parameter group.
        gather: Gathers some of the parameters, as ``gather(output, shard, group)``: [shard] -> [ranks * shard].
    """

    def __init__(self, module: FSDPModule, gather: Callable[[Tensor, Tensor, Any], object]) -> None:
        super().__init__(lambda: weights_version(module), lambda: trainable(module))
        self._unsharded = ReusedUnshard(
            module, stale=self.stale, used=self._compare_in_forward, unsharded=self.mark_valid, gather=gather
        )

    @override
    def tensors(self) -> list[Tensor]:
        """Memory of the unsharded parameters, each [ranks * shard], if some are cached."""
        return self._unsharded.tensors() if self._cached_version is not None else []

    @override
    def drop(self) -> None:
        """Free the unsharded parameters, or let FSDP2 do so after their use: the next use gathers them."""
        super().drop()
        self._unsharded.free()

    @override
    def drop_trained(self) -> None:
        """Drop what requires gradients; if that is all, its memory is freed."""
        super().drop_trained()
        if self._cached_version is not None and len(self.stale()) == len(self._cached_version):
            self.drop()

    def _compare_in_forward(self, *, in_forward: bool) -> None:
        if in_forward:  # a backward uses the weights of its forward, even if they have changed since
            self.compare(self._unsharded.own_parts())
