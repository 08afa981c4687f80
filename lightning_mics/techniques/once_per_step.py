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

Optimizer states stay sharded, so this takes less memory than DDP, which holds them whole. FSDP2 itself holds gradients
back (``set_requires_gradient_sync``). It can hold gathered parameters back too, but then the module would show them
instead of its shards, and what users change between micro-steps would be lost; here the shards are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import AllGather, GatheredParameters, weights_version
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.hierarchical import HierarchicalReduceScatter, TwoStages
from lightning_mics.techniques.pending_gradients import PendingGradients


class ParameterCache:
    """What one unit (a block, or what the root holds) has gathered, for the next time.

    All ranks must come to the same decision, or they would wait for each other: weights are changed by all or by none.

    Args:
        version: Returns what differs after each change of the unit's weights that torch knows of.
    """

    def __init__(self, version: Callable[[], Hashable]) -> None:
        self._version = version
        self._kept_version: Hashable = None
        self._differs: Tensor | None = None  # [], bool: whether a shard was not what its copy says

    @property
    def usable(self) -> bool:
        """Whether there is a copy, and no change of the weights since that torch knows of."""
        return self._kept_version is not None and self._kept_version == self._version()

    def made(self) -> None:
        """There is a copy now, of the weights as they are."""
        self._kept_version = self._version()

    def drop(self) -> None:
        """Forget the copy: the next use gathers."""
        self._kept_version = None

    def tensors(self) -> list[Tensor]:
        """What is kept now."""
        raise NotImplementedError

    def compare(self, own: Tensor, shard: Tensor) -> None:
        """Note whether this rank's ``own`` part of the copy is its ``shard`` still; does not wait for a device."""
        if own.is_cuda:
            differs = _bits_differ(own, shard)
            self._differs = differs if self._differs is None else self._differs | differs
        elif not torch.equal(own, shard) and _bits_differ(own, shard):
            self._differs = torch.tensor(True)

    def take_differs(self) -> Tensor | None:
        """Whether a copy was used that was not what its shard held by then: [], or None if no copy is known to be."""
        differs, self._differs = self._differs, None
        return differs


class NodeCache(ParameterCache, TwoStages, AllGather):
    """All-gather that crosses nodes only when the node has no copy.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        module: The unit; its version says when weights have changed.
    """

    def __init__(self, *, rail: CountedGroup, node: CountedGroup | None, module: FSDPModule) -> None:
        ParameterCache.__init__(self, lambda: weights_version(module))
        TwoStages.__init__(self, rail=rail, node=node)
        self._rail_slice: Tensor | None = None  # [nodes * shard]

    def __call__(
        self,
        output_tensor: Tensor,  # [local ranks * nodes * shard]
        input_tensor: Tensor,  # [shard], this rank's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every shard into ``output_tensor``, in the order of ``group`` (rail by rail)."""
        kept = self._rail_slice
        if kept is not None and self.usable:
            self.compare(kept.chunk(self.rail.size)[self.rail.rank], input_tensor)
        else:
            kept = torch.empty_like(self.rail_slice(output_tensor, group))
            self.rail.all_gather(kept, input_tensor, technique="gather along rails")
            self._rail_slice = kept
            self.made()
        if kept.is_cuda:  # made on another stream perhaps, when a user gathers a module by hand
            kept.record_stream(torch.cuda.current_stream(kept.device))
        if self.node is None:
            output_tensor.copy_(kept)
            return None
        return self.node.all_gather(output_tensor, kept, technique="gather inside nodes", async_op=async_op)

    def tensors(self) -> list[Tensor]:
        """The rail's slice, [nodes * shard], if there is one."""
        return [] if self._rail_slice is None else [self._rail_slice]

    def drop(self) -> None:
        """Forget the copy: the next gather crosses nodes."""
        super().drop()
        self._rail_slice = None


class NodeReduceScatter(HierarchicalReduceScatter):
    """Reduce-scatter inside the node in every micro-step; along the rail at the boundary only.

    Before the boundary the output is zeros, and ``pending_gradients`` holds the node's sum.

    Args:
        rail: The ranks with this local rank, one per node, in the order of nodes.
        node: The ranks on this node, in the order of local ranks; None if there is one.
        pending_gradients: What this unit keeps back, and whether this is the boundary.
        wire_dtype: What crosses nodes; None is the dtype of the sums.
    """

    def __init__(
        self,
        *,
        rail: CountedGroup,
        node: CountedGroup | None,
        pending_gradients: PendingGradients,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rail=rail, node=node, wire_dtype=wire_dtype)
        self._pending_gradients_of = pending_gradients

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
        if not self._pending_gradients_of.at_boundary:
            self._pending_gradients_of.accumulate(rail_slice)
            output_tensor.zero_()
            return None
        self._pending_gradients_of.add_into(rail_slice)
        return self.reduce_along_rail(output_tensor, rail_slice, op, async_op=async_op)


class RankCache(ParameterCache):
    """A unit's gathered parameters, which stay in memory between uses. Gathers only if they are not there.

    Args:
        module: The unit.
    """

    def __init__(self, module: FSDPModule) -> None:
        super().__init__(lambda: weights_version(module))
        self._gathered = GatheredParameters(module, reuse=self._reuse, made=self.made)

    def tensors(self) -> list[Tensor]:
        """The gathered parameters."""
        return self._gathered.whole() if self.usable else []

    def drop(self) -> None:
        """Free the copy, or let FSDP2 do so after its use: the next use gathers."""
        super().drop()
        self._gathered.free()

    def _reuse(self, *, in_forward: bool) -> bool:
        if not self.usable:
            return False
        if in_forward:  # nobody means a backward to see other weights than its forward
            for own, shard in self._gathered.own_parts():
                self.compare(own, shard)
        return True


def _bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether the tensors differ, [], where not-a-number equals itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size(), torch.uint8)
    return (one.view(bits) != other.view(bits)).any()
