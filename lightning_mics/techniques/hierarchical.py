"""Technique 2: hierarchical collectives. Cross the slow network with each byte once per rail, then spread inside nodes.

MiCS, section 3.3. Gathering M bytes over a partition group of p ranks, k on each node, flat brings (p-1)M/p bytes into
each node; in two stages it is (p-k)M/p: each byte of another node arrives once. Two nodes of two ranks (rank = 2 * node
+ local), with shards A B C D held by ranks 0 2 1 3, which is the order of the partition group, rail by rail::

    output     [ A B | C D ]     one slice per rail
    rank 0     [ A . | . . ]  stage 1, rail (0, 2)   [ A B | . . ]  stage 2, node (0, 1)   [ A B | C D ]
    rank 1     [ . . | C . ]  stage 1, rail (1, 3)   [ . . | C D ]  stage 2, node (0, 1)   [ A B | C D ]

What a rail gathers is one contiguous slice, so both stages work in place: no rearranging, no staging buffer (the paper
needs both). The reduce-scatter, which the paper leaves flat, is the mirror image: node first, then rail.

Where a partition group has one rank on each node there is no second stage, and ``node`` is None.

*The stages of two units, side by side.* The first stage runs on a stream of its own, which waits for nothing but the
input. So it runs beside the second stage of the unit before it, which uses the other kind of link. FSDP2 asks for the
memory of the input on the stream that then fills it::

    copy-in stream       fill 1   fill 2   fill 3
    rail stream                   rail 1   rail 2   rail 3
    all-gather stream                      node 1   node 2   node 3

For reductions it is node and rail, and the stream that fills the input is that of the arithmetic. It waits for the
whole reduction of the unit before, unless ``set_reduce_scatter_max_input_buffers`` of torch 2.13 gives it another
buffer to fill in the meantime.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_mics._torch.fsdp import AllGather, OrdinaryBuffers, ReduceScatter
from lightning_mics._torch.process_groups import premultiplied_sum_factor
from lightning_mics._torch.streams import SideStream, current_stream, keep_for_current_stream
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.inter_node_prefetch import FetchedSlice, UnitPrefetch

# FSDP2 divides gradients of any other dtype before they are reduced, on the stream that reduces them
NOT_DIVIDED_BEFORE = (torch.float32, torch.bfloat16)


class TwoStages(OrdinaryBuffers):
    """The groups of a two-stage collective in either direction, and the stream of its first stage.

    The stages of two units run side by side, as the module says.

    Args:
        rail: Ranks with this local rank, one per node, in the order of nodes.
        node: Ranks on this node, in the order of local ranks; None if there is one.
        first_stage: Stream of the first stage, which all parameter groups of a model share; None makes a new one.
    """

    def __init__(self, *, rail: CountedGroup, node: CountedGroup | None, first_stage: SideStream | None = None) -> None:
        self.rail = rail
        self.node = node
        self.first_stage = first_stage or SideStream()
        self._filled_on: dict[int, Any] = {}  # streams by number of elements: inputs and outputs differ in it

    @override
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory that FSDP2 then fills on the current stream, or has filled: [size].

        Args:
            size: Numbers of elements, one per dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        memory = super().allocate(size, dtype=dtype, device=device)
        self._filled_on[memory.numel()] = current_stream(device)
        return memory

    def filled_on(self, memory: torch.Tensor) -> Any:
        """The stream that has filled ``memory``, [any]; the current one if FSDP2 has not asked for it here."""
        return self._filled_on.get(memory.numel()) or current_stream(memory.device)

    def rail_slice(self, unsharded: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Return the slice of this rank's rail: [nodes * shard].

        Args:
            unsharded: Unsharded values: [local ranks * nodes * shard].
            group: Partition group.

        Raises:
            RuntimeError: If ``group`` is not the partition group of these rails and nodes.
        """
        local_ranks = 1 if self.node is None else self.node.size
        if group.size() != self.rail.size * local_ranks:
            raise RuntimeError(
                f"called for a group of {group.size()} ranks, made for {self.rail.size} nodes of {local_ranks}"
            )
        return unsharded if self.node is None else unsharded.chunk(local_ranks)[self.node.rank]


class HierarchicalAllGather(TwoStages, AllGather):
    """All-gather over a partition group in two stages, in place: along the rail, then inside the node.

    Args:
        rail: Ranks with this local rank, one per node, in the order of nodes.
        node: Ranks on this node, in the order of local ranks; None if there is one.
        first_stage: Stream of the first stage; see :class:`TwoStages`.
        prefetch: Prefetch of the unit, which may have run the first stage before; None where there is none.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        first_stage: SideStream | None = None,
        prefetch: UnitPrefetch | None = None,
    ) -> None:
        super().__init__(rail=rail, node=node, first_stage=first_stage)
        self.prefetch = prefetch

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [local ranks * nodes * shard]
        input_tensor: torch.Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail).

        The current stream waits for both stages, as FSDP2 expects of its own all-gather; with ``async_op`` it waits for
        neither, and the returned work covers both.
        """
        rail_slice, device = self.rail_slice(output_tensor, group), output_tensor.device
        fetched = None if self.prefetch is None else self.prefetch.take()
        if self.node is None:
            return self._along_rail(output_tensor, input_tensor, fetched, async_op=async_op)
        here = current_stream(device)
        with self.first_stage.after(self.filled_on(output_tensor), device):
            if fetched is None:
                self.rail.all_gather(rail_slice, input_tensor, technique="gather along rails")
            else:
                fetched.wait()
                rail_slice = fetched.values
            if async_op:  # called from here the work is ordered after the rail's, and `here` after nothing
                work = self.node.all_gather(output_tensor, rail_slice, technique="gather inside nodes", async_op=True)
                self._fetch_next(output_tensor)
                return work
        here.wait_event(self.first_stage.record())
        self._fetch_next(output_tensor)
        work = self.node.all_gather(output_tensor, rail_slice, technique="gather inside nodes")
        if fetched is not None:
            keep_for_current_stream(rail_slice)  # freed, its memory goes back to the stream of the rail
        return work

    def gather_some(self, output: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Gather some of the parameters, of which nothing is fetched before: [shard] -> [local ranks * nodes * shard].

        Args:
            output: Memory of the result: [local ranks * nodes * shard].
            shard: This rank's shards of the parameters, side by side: [shard].
            group: Partition group.
        """
        rail_slice = self.rail_slice(output, group)
        self.rail.all_gather(rail_slice, shard, technique="gather along rails")
        if self.node is not None:
            self.node.all_gather(output, rail_slice, technique="gather inside nodes")

    def _along_rail(
        self, output: torch.Tensor, shard: torch.Tensor, fetched: FetchedSlice | None, *, async_op: bool
    ) -> dist.Work | None:
        """The only stage, unless :meth:`allocate` gave FSDP2 what was fetched: [shard] -> [nodes * shard]."""
        work = None
        if fetched is None:
            work = self.rail.all_gather(output, shard, technique="gather along rails", async_op=async_op)
        self._fetch_next(output)
        return work

    def _fetch_next(self, output: torch.Tensor) -> None:
        if self.prefetch is not None:
            self.prefetch.fetch_next(self.first_stage, self.filled_on(output), output.device)

    @override
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory of the result, [size]: what was fetched, if that is all of it, or new memory.

        Args:
            size: Numbers of elements, one per dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        fetched = self._whole()
        if fetched is None:
            return super().allocate(size, dtype=dtype, device=device)
        fetched.wait()
        self._filled_on[fetched.values.numel()] = current_stream(device)
        return fetched.values

    def _whole(self) -> FetchedSlice | None:
        """What was fetched of a unit with one rank on each node, where a slice is all of the unit."""
        return None if self.prefetch is None or self.node is not None else self.prefetch.peek()


class HierarchicalReduceScatter(TwoStages, ReduceScatter):
    """Reduce-scatter over a partition group in two stages: inside the node, then along the rail.

    The first stage leaves its result in place, in the slice of the input that belongs to this rank's rail. An average
    is the average of averages, as all nodes have the same number of ranks; the factor of a pre-multiplied sum is
    applied by the first stage alone.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        first_stage: Stream of the first stage; see :class:`TwoStages`.
        wire_dtype: Dtype of inter-node messages; None is the dtype of the sums.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        first_stage: SideStream | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rail=rail, node=node, first_stage=first_stage)
        self._wire_dtype = wire_dtype

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [shard]
        input_tensor: torch.Tensor,  # [local ranks * nodes * shard], overwritten
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce ``input_tensor`` over ``group`` and leave this rank's shard in ``output_tensor``."""
        rail_slice = self.reduce_in_node(input_tensor, group, op)
        return self.reduce_along_rail(output_tensor, rail_slice, op, async_op=async_op)

    def reduce_in_node(self, unsharded: torch.Tensor, group: dist.ProcessGroup, op: ReduceOp) -> torch.Tensor:
        """Stage 1, in place; returns this rail's slice of the node's sum: [nodes * shard].

        Args:
            unsharded: Unsharded gradients of this rank, overwritten: [local ranks * nodes * shard].
            group: Partition group.
            op: Sum, average or pre-multiplied sum.
        """
        rail_slice = self.rail_slice(unsharded, group)
        if self.node is not None:
            here, device = current_stream(unsharded.device), unsharded.device
            filled_on = self.filled_on(unsharded) if unsharded.dtype in NOT_DIVIDED_BEFORE else here
            with self.first_stage.after(filled_on, device):
                self.node.reduce_scatter(rail_slice, unsharded, op=op, technique="reduce inside nodes")
            here.wait_event(self.first_stage.record())
        return rail_slice

    def reduce_along_rail(
        self, output: torch.Tensor, rail_slice: torch.Tensor, op: ReduceOp, *, async_op: bool = False
    ) -> dist.Work | None:
        """Stage 2: [nodes * shard] -> [shard].

        Args:
            output: Result of this rank: [shard].
            rail_slice: Result of stage 1: [nodes * shard].
            op: Reduction of both stages together.
            async_op: Whether to return before the collective has finished, with the work to wait for.
        """
        scaled = self.node is not None and premultiplied_sum_factor(op) is not None
        return self.rail.reduce_scatter(
            output,
            rail_slice,
            op=dist.ReduceOp.SUM if scaled else op,
            technique="reduce along rails",
            wire_dtype=self._wire_dtype,
            async_op=async_op,
        )
