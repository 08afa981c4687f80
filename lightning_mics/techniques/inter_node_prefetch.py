"""Beyond the paper: the rail's slice of the units that come next, fetched while this one is spread out and computed.

In two stages a unit, which is a block or the root's own parameters, comes first along the rail, between nodes, and then
inside the node. FSDP2 has one gather in flight in a backward, and on gloo each stage blocks the program. With
``inter_node_prefetch=1`` the stage along the rail of a unit begins with the gather of the unit before it::

    rail stream           rail 1   rail 2   rail 3
    all-gather stream              node 1            node 2            node 3
    arithmetic                              unit 1            unit 2            unit 3

The slice, unsharded bytes / local ranks, is gathered into memory of its own, from which the node's ranks are then given
theirs: nothing is copied again. Where there is one rank on each node the slice is the unit, and FSDP2 gets its memory.

*Which units are fetched.* Those that the micro-step is expected to gather next, as the two before it did
(:mod:`~lightning_mics.techniques.micro_step_order`). So in steady training as many bytes are sent, by as many
collectives, as without. What is fetched and then not used is dropped at the end of the micro-step, and whenever cached
weights are dropped; weights that have changed since are gathered again.

All of this follows from what a rank has gathered before. The ranks of a partition group agree on that, and on what is
fetched with it, before each gather: see :mod:`lightning_mics.sharding.ranks.agreement`.

Units whose cached slice waits on the host (:mod:`~lightning_mics.techniques.cache_offload`) are not fetched along the
rail: the slice of the next one begins to come back to the device instead, which other ranks do not take part in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import weights_version
from lightning_mics._torch.streams import SideStream, current_stream, has_streams
from lightning_mics._torch.units.gather_inputs import GatherInputs, gather_inputs
from lightning_mics._torch.units.param_groups import in_backward
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.techniques.micro_step_order import MicroStepOrder, UseOrder

Memory = Callable[[int, torch.dtype, torch.device], Tensor]  # of so many elements


@dataclass(frozen=True)
class FetchedSlice:
    """A rail's slice that is on its way, or there.

    Attributes:
        values: The slice: [nodes * shard].
        version: Version of the weights that it is of.
        work: The collective, where no stream orders it; else None.
        arrived: Event after it.
    """

    values: Tensor
    version: Hashable
    work: dist.Work | None
    arrived: Any

    def wait(self) -> None:
        """Have the current stream wait until the slice is there, or this rank where there are no streams."""
        if self.work is not None:
            self.work.wait()
        current_stream(self.values.device).wait_event(self.arrived)


class UnitPrefetch:
    """The prefetch of one unit: its slice, and what is fetched when it is gathered.

    Args:
        name: Fully qualified name of the module; empty for the root.
        module: FSDP module.
        rail: Ranks with this local rank, one per node, in the order of nodes.
        prefetch: Prefetch of the model.
    """

    def __init__(self, name: str, module: FSDPModule, rail: CountedGroup, prefetch: InterNodePrefetch) -> None:
        self.name = name or "the root"
        self.module = module
        self._rail = rail
        self._prefetch = prefetch
        self.cached: Callable[[], bool] | None = None  # whether a cache serves its gathers; None where there is none
        self.memory: Memory = _new_memory
        self.fetch_from_host: Callable[[], None] | None = None  # a cached slice; None where none waits there
        self._taken: FetchedSlice | None = None
        self._next: Sequence[Next] | None = None  # None before the gather was announced
        self._next_gathered: UnitPrefetch | None = None

    def peek(self) -> FetchedSlice | None:
        """The slice, if it is of the weights as they are."""
        fetched = self._prefetch.fetched.get(self)
        return fetched if fetched is not None and fetched.version == weights_version(self.module) else None

    def announce(self) -> str:
        """Decide what the gather that follows uses and fetches; returns it in words, for all ranks to agree on."""
        self._taken = self.peek()
        if self._taken is None:
            self._prefetch.drop(self)
        self._prefetch.fetched.pop(self, None)
        self._next, self._next_gathered = self._prefetch.next_after(self, backward=in_backward(self.module))
        words = ", fetched before" if self._taken is not None else ""
        return words + (f", and fetches {', '.join(repr(unit.name) for unit, _ in self._next)}" if self._next else "")

    def take(self) -> FetchedSlice | None:
        """The slice for the gather that runs now; None if it was not fetched."""
        if self._next is None:  # nobody to agree with
            self.announce()
        taken, self._taken = self._taken, None
        return taken

    def fetch_next(self, first_stage: SideStream, after: Any, device: torch.device) -> None:
        """Fetch what was decided for the gather that runs now.

        Args:
            first_stage: Stream of the stage along rails.
            after: Stream after which the weights may be read.
            device: The device of this rank.
        """
        units, self._next = self._next, None
        if units:
            with first_stage.after(after, device):
                for unit, inputs in units:
                    self._prefetch.fetched[unit] = unit._fetch(inputs, first_stage, device)
        following, self._next_gathered = self._next_gathered, None
        if following is not None and following.fetch_from_host is not None:
            following.fetch_from_host()

    def _fetch(self, inputs: GatherInputs, first_stage: SideStream, device: torch.device) -> FetchedSlice:
        values = self.memory(self._rail.size * inputs.numel, inputs.dtype, device)
        shard = values.chunk(self._rail.size)[self._rail.rank]
        inputs.copy_to(shard)
        work = self._rail.all_gather(values, shard, technique="gather along rails", async_op=not has_streams(device))
        return FetchedSlice(values, weights_version(self.module), work, first_stage.record())


Next = tuple[UnitPrefetch, GatherInputs]


class InterNodePrefetch:
    """The prefetch of a model; the module says which units are fetched.

    Args:
        units_ahead: Largest number of slices that are held before they are used.
        order: Order of the gathers of the model.

    Attributes:
        fetched: Slices that are not used yet, on their way or there.
    """

    def __init__(self, units_ahead: int, order: MicroStepOrder) -> None:
        self.fetched: dict[UnitPrefetch, FetchedSlice] = {}
        self._units_ahead = units_ahead
        self._order = order
        order.when_over(self._drop_slices)

    def unit(self, name: str, module: FSDPModule, rail: CountedGroup) -> UnitPrefetch:
        """The prefetch of one unit, which is called in each of its gathers.

        Args:
            name: Fully qualified name of the module; empty for the root.
            module: FSDP module.
            rail: Ranks with this local rank, one per node, in the order of nodes.
        """
        return UnitPrefetch(name, module, rail, self)

    def next_after(self, unit: UnitPrefetch, *, backward: bool) -> tuple[Sequence[Next], UnitPrefetch | None]:
        """The units to fetch with a gather of ``unit``, with their shards, and the next one if its slice is cached.

        Args:
            unit: Unit that is gathered.
            backward: Whether it is gathered for a backward.
        """
        order: UseOrder[UnitPrefetch] = self._order.gathers(backward=backward)
        order.add((unit, backward))
        units: dict[UnitPrefetch, GatherInputs] = {}
        for each in order.coming(self._units_ahead):
            kept = each.cached is not None and (each is unit or each.cached())
            if len(units) + len(self.fetched) < self._units_ahead and not kept and each not in self.fetched:
                inputs = gather_inputs(each.module)
                if inputs is not None:
                    units[each] = inputs
        return tuple(units.items()), next(iter(order.coming(1)), None)

    def drop(self, unit: UnitPrefetch) -> None:
        """Drop a slice, if there is one; what the current stream does next comes after it was read and written.

        A collective without a stream keeps its memory itself.
        """
        fetched = self.fetched.pop(unit, None)
        if fetched is not None and has_streams(fetched.values.device):
            current_stream(fetched.values.device).wait_event(fetched.arrived)

    def _drop_slices(self) -> None:
        for unit in list(self.fetched):
            self.drop(unit)


def _new_memory(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what an evaluation fetches may be used in training
        return torch.empty(numel, dtype=dtype, device=device)
