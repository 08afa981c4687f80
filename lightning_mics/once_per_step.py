"""Beyond the paper: each byte travels once per optimizer step, whatever the number of micro-steps.

Parameters change once per optimizer step, but every use of a block gathers it again, in forward and backward of every
micro-step. What was gathered first can be kept until the boundary, and gradients can be added up until then, on two
levels.

*Nodes keep it.* Each rank keeps its rail's slice, so that a node holds one copy spread over its ranks, and later
gathers stay inside the node; gradients are reduced inside the node and added up there. Here over several nodes::

    micro-step        1               2               3        boundary
    gather       rail, node          node            node        node          in forward; in backward always node
    reduce            node           node            node     node, rail

A node then sends M(N-1)/N bytes of parameters and as much of gradients per step over N nodes, which is the least
possible, for any partition size. The price on each rank is M/k bytes for the copy and the gradients' M/k, with k ranks
on each node.

*Each rank keeps it*, all of it: the price is M bytes for the copy and the gradients' M. Then nothing travels inside
nodes either, but once per step::

    gather     whole group            -               -           -            in backward never
    reduce          -                 -               -       whole group

Optimizer states stay sharded, so this takes less memory than DDP, which holds them whole.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch_compat import AllGather, ReduceScatter
from lightning_mics.deferral import Deferral
from lightning_mics.hierarchical import HierarchicalReduceScatter, TwoStages
from lightning_mics.kept_copy import KeptCopy
from lightning_mics.traffic import CountedGroup, ReduceOp


class NodeKeepsAllGather(TwoStages, AllGather):
    """All-gather that crosses nodes only when the node has no copy.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        copy: Where this rank's part of the node's copy is: what its rail gathers.
    """

    def __init__(self, *, rail: CountedGroup, node: CountedGroup | None, copy: KeptCopy) -> None:
        super().__init__(rail=rail, node=node)
        self._copy = copy

    def __call__(
        self,
        output_tensor: Tensor,  # [local ranks * nodes * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail)."""

        def cross() -> Tensor:
            rail_slice = torch.empty_like(self.rail_slice(output_tensor, group))
            self.rail.all_gather(rail_slice, input_tensor, technique="gather along rails")
            return rail_slice

        kept = self._copy.get(input_tensor, position=self.rail.rank, make=cross)
        if self.node is None:
            output_tensor.copy_(kept)
            return None
        return self.node.all_gather(output_tensor, kept, technique="gather inside nodes", async_op=async_op)


class NodeKeepsReduceScatter(HierarchicalReduceScatter):
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


class RankKeepsAllGather(AllGather):
    """All-gather that communicates only when this rank, and so every rank, has no copy.

    Args:
        gather: Gathers from the whole group.
        copy: Where the copy is.
    """

    def __init__(self, gather: AllGather, *, copy: KeptCopy) -> None:
        self._gather = gather
        self._copy = copy

    def __call__(
        self,
        output_tensor: Tensor,  # [ranks * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group``."""

        def gather() -> Tensor:
            whole = torch.empty_like(output_tensor)
            self._gather(whole, input_tensor, group)
            return whole

        output_tensor.copy_(self._copy.get(input_tensor, position=group.rank(), make=gather))
        return None


class RankKeepsReduceScatter(ReduceScatter):
    """Reduce-scatter at the boundary only.

    Before the boundary the output is zeros, and ``deferral`` holds this rank's own sum.

    Args:
        reduce: Reduces over the whole group.
        deferral: What this unit keeps back, and whether this is the boundary.
    """

    def __init__(self, reduce: ReduceScatter, *, deferral: Deferral) -> None:
        self._reduce = reduce
        self._deferral = deferral

    def __call__(
        self,
        output_tensor: Tensor,  # [shard]
        input_tensor: Tensor,  # [ranks * shard], overwritten
        group: dist.ProcessGroup,
        op: ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Add up ``input_tensor``; at the boundary leave the window's shard in ``output_tensor``."""
        if not self._deferral.at_boundary:
            self._deferral.keep_back(input_tensor)
            output_tensor.zero_()
            return None
        self._deferral.release_into(input_tensor)
        return self._reduce(output_tensor, input_tensor, group, op, async_op)
