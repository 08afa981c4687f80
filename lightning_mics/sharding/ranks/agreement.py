"""What the ranks of a sharded model agree on: the units that they gather and reduce, in order, and optimizer steps.

Ranks of one partition group agree on gathers and on hop 1, ranks of one replication group on hop 2, each before the
collective begins: see [Note: Agreement without waiting]. Ranks of different partition groups may gather differently, as
when they evaluate other numbers of batches::

    partition group 0     rank 0 --- agree on gathers and hop 1 --- rank 1
                            |                                         |
                       agree on hop 2                            agree on hop 2
                            |                                         |
    partition group 1     rank 2 --- agree on gathers and hop 1 --- rank 3
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_mics._torch.fsdp import AllGather, fsdp_modules, sharded_parameters
from lightning_mics._torch.optimizers.steps import call_before_steps
from lightning_mics._torch.units.param_groups import (
    NotedAllGather,
    around_end_of_backward,
    in_backward,
    note_reductions,
)
from lightning_mics.collectives.control_plane import Stream
from lightning_mics.techniques.flat import FlatAllGather
from lightning_mics.techniques.hierarchical import HierarchicalAllGather
from lightning_mics.techniques.parameter_cache import NodeSlice
from lightning_mics.techniques.partition_groups import PartitionGroups

# by how many parameters are gathered between nodes
WHERE = {"all": "", "some": " inside the node, with what is not cached", "none": " inside the node"}


class RankAgreement:
    """Makes the ranks of one model agree before each of its collectives.

    Args:
        groups: Process groups of this rank.
    """

    def __init__(self, groups: PartitionGroups) -> None:
        rank, topology = dist.get_rank(), groups.topology
        self._control = groups.control
        self._partition = self._control.stream(topology.partition_group(rank))
        self._replication = self._control.stream(topology.replication_group(rank))

    def before_gathers(self, name: str, module: FSDPModule, gather: AllGather) -> Any:
        """``gather``, before which the ranks of the partition group agree.

        Args:
            name: Fully qualified name of the module.
            module: FSDP module whose parameters are gathered.
            gather: All-gather of the module.
        """
        stream = self._partition
        if stream is None:
            return gather
        words = {
            (backward, gathered): f"gathers {name or 'the root'!r} for a {'backward' if backward else 'forward'}{where}"
            for backward in (False, True)
            for gathered, where in WHERE.items()
        }

        prefetch = gather.prefetch if isinstance(gather, HierarchicalAllGather) else None

        def agree() -> None:
            gathered = gather.gathered if isinstance(gather, NodeSlice) else "all"
            ahead = prefetch.announce() if prefetch is not None else ""
            stream.agree(words[in_backward(module), gathered] + ahead)

        return NotedAllGather(gather, before=agree, explained=self._control.explained)

    def before_some(self, name: str, gather: FlatAllGather | HierarchicalAllGather) -> Callable[..., None]:
        """``gather.gather_some``, before which the ranks of the partition group agree.

        Args:
            name: Fully qualified name of the module.
            gather: All-gather of the module.
        """
        stream, words = self._partition, f"gathers what is not cached of {name or 'the root'!r}"

        def gather_some(output: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
            if stream is not None:
                stream.agree(words)
            try:
                gather.gather_some(output, shard, group)
            except RuntimeError as error:
                raise self._control.explained(error) from error

        return gather_some

    @contextmanager
    def direct_use(self, kind: str, axis: str, name: str) -> Iterator[None]:
        """Run a collective inside that serves the direct use of a parameter, once its ranks agree on it.

        Args:
            kind: Kind of the collective.
            axis: Axis of the mesh by name.
            name: What is communicated.
        """
        stream = self._partition if axis == "shard" else self._replication
        if stream is not None:
            stream.agree(f"{'gathers' if kind == 'all_gather' else 'reduces'} {name}, which is used directly")
        try:
            yield
        except RuntimeError as error:
            raise self._control.explained(error) from error

    def follow(self, root: FSDPModule) -> None:
        """Agree before each reduction of a module under ``root``, and before each step of its optimizers."""
        if self._partition is None and self._replication is None:
            return
        for name, module in fsdp_modules(root).items():
            reduction = _Reduction(name, self._partition, self._replication)
            note_reductions(module, before=reduction.agree, explained=self._control.explained)
        around_end_of_backward(root, after=self._count_micro_step)
        self._follow_steps(root)

    def _count_micro_step(self) -> None:
        self._control.micro_step += 1

    def _follow_steps(self, root: FSDPModule) -> None:
        self._modules = fsdp_modules(root)
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        call_before_steps(self._agree_on_step)

    def _trains(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds parameters of this model; it is asked again when groups were added."""
        groups = len(optimizer.param_groups)
        if optimizer not in self._known or self._known[optimizer][0] != groups:
            ours = {id(parameter) for module in self._modules.values() for parameter in sharded_parameters(module)}
            held = any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
            self._known[optimizer] = (groups, held)
        return self._known[optimizer][1]

    def _agree_on_step(self, optimizer: Optimizer) -> None:
        if not self._trains(optimizer):
            return
        self._control.check()
        for stream in (self._partition, self._replication):
            if stream is not None:
                stream.agree(f"steps {type(optimizer).__name__}", starts_over=True)


class _Reduction:
    """The words for the reductions of one unit, and the streams that agree on them."""

    def __init__(self, name: str, partition: Stream | None, replication: Stream | None) -> None:
        self._name = name or "the root"
        self._partition = partition
        self._replication = replication
        self._words: dict[tuple[int, bool], str] = {}

    def agree(self, with_gradient: int, all_reduced: bool) -> None:
        replication = self._replication if all_reduced else None
        over_replicas = replication is not None
        words = self._words.get((with_gradient, over_replicas))
        if words is None:
            parameters = [str(index) for index in range(with_gradient.bit_length()) if with_gradient >> index & 1]
            words = f"reduces gradients of {self._name!r} (parameters {', '.join(parameters)})"
            words += " over the replicas" if over_replicas else ""
            self._words[with_gradient, over_replicas] = words
        if self._partition is not None:
            self._partition.agree(words)
        if replication is not None:
            replication.agree(words)
