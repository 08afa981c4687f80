"""Beyond the paper: traffic between nodes once per optimizer step, whatever the number of micro-steps.

Parameters change once per optimizer step, but every use of a block gathers it across nodes again, in forward and
backward of every micro-step. Here each rank keeps its rail's slice of what was gathered first, so that a node holds one
copy spread over its ranks, and later gathers stay inside the node. Gradients are reduced inside the node and added up
there; they cross nodes at the boundary::

    micro-step        1               2               3        boundary
    gather       rail, node          node            node        node          in forward; in backward always node
    reduce            node           node            node     node, rail

A node then sends M(N-1)/N bytes of parameters and as much of gradients per step over N nodes, which is the least
possible, for any partition size. The price on each rank is M/k bytes for the copy and the gradients' M/k, with k ranks
on each node.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch_compat import AllGather
from lightning_mics.deferral import Deferral
from lightning_mics.hierarchical import HierarchicalReduceScatter, TwoStages
from lightning_mics.traffic import CountedGroup, ReduceOp


class OncePerStepAllGather(TwoStages, AllGather):
    """All-gather that crosses nodes the first time only, until :meth:`drop` or a change of the weights.

    All ranks must come to the same decision, or they would wait for each other: weights are changed by all or by none.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        version: Returns what differs after each change of the unit's weights that torch knows of.
    """

    def __init__(self, *, rail: CountedGroup, node: CountedGroup | None, version: Callable[[], Hashable]) -> None:
        super().__init__(rail=rail, node=node)
        self._version = version
        self._kept: Tensor | None = None  # [nodes * shard], this rail's slice
        self._kept_version: Hashable = None
        self._differs: Tensor | None = None  # [], bool: whether a shard was not what its copy says

    def __call__(
        self,
        output_tensor: Tensor,  # [local ranks * nodes * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail)."""
        rail_slice = self.rail_slice(output_tensor, group)
        kept = self._kept
        if kept is None or self._version() != self._kept_version:
            kept = self._cross(torch.empty_like(rail_slice), input_tensor)
        else:
            self._compare(kept, input_tensor)
        if kept.is_cuda:  # made on another stream perhaps, when a user gathers a module by hand
            kept.record_stream(torch.cuda.current_stream(kept.device))
        if self.node is None:
            output_tensor.copy_(kept)
            return None
        return self.node.all_gather(output_tensor, kept, technique="gather inside nodes", async_op=async_op)

    def drop(self) -> None:
        """Forget the copy: the next gather crosses nodes."""
        self._kept = self._kept_version = None

    def take_differs(self) -> Tensor | None:
        """Whether a copy was used that was not what its shard held by then: [], or None if no copy was used again."""
        differs, self._differs = self._differs, None
        return differs

    def _cross(self, kept: Tensor, shard: Tensor) -> Tensor:
        self.rail.all_gather(kept, shard, technique="gather along rails")
        self._kept, self._kept_version = kept, self._version()
        return kept

    def _compare(self, kept: Tensor, shard: Tensor) -> None:
        """Note, without waiting for the device, whether this rank's part of the copy still is its shard, bit by bit."""
        own = kept.chunk(self.rail.size)[self.rail.rank]
        differs = (own.view(torch.uint8) != shard.view(torch.uint8)).any()
        self._differs = differs if self._differs is None else self._differs | differs


class OncePerStepReduceScatter(HierarchicalReduceScatter):
    """Reduce-scatter inside the node in every micro-step; along the rail at the boundary only.

    Before the boundary the output is zeros, and ``deferral`` holds the node's sum.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        deferral: What this unit keeps back, and whether this is the boundary.
        wire_dtype: What crosses nodes; None is the dtype of the sums.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        deferral: Deferral,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rail=rail, node=node, wire_dtype=wire_dtype)
        self._deferral = deferral

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
        if not self._deferral.at_boundary:
            self._deferral.keep_back(rail_slice)
            output_tensor.zero_()
            return None
        self._deferral.release_into(rail_slice)
        return self.reduce_along_rail(output_tensor, rail_slice, op, async_op=async_op)
