"""Memory of a rank at the peak of an optimizer step, in closed form.

A micro-step is a row of phases, from the gather of the root to the reduction of its gradients
(:class:`~lightning_mics.policy.activations.Activations`). For each, what FSDP2 and the caches hold is added to the
activations. M and R are the bytes of a block, unsharded and as it is reduced, m and r those of the root::

    phase     gathered                                  reduced
    start     2 m + 2 M: in use, and as they were sent
    forward   m + 2 M: in use, and as it was sent
    gather    m + 3 M: of the last block likewise, and the one before it as it was sent
    loss      m + M: the last block, as it was sent
    head      m + M: the last block, ahead
    last      m + 2 M: in use, and the next ahead       R where a rank has all
    blocks    m + 2 M                                   R of the block before
    second    m + 2 M                                   R
    between   m + 2 M: in use, and as it was sent       R
    first     m + M                                     R
    end       m                                         R
    reduced                                             r

What ranks cache is there in all phases, and not gathered: with ``frozen_on_ranks`` the 2 M are those of the blocks that
are not cached, 3 M before the forward of the last of these.

Gradients of a block are among the activations until they are reduced. Sharded gradients are there from the start where
several micro-steps add to them, else as far as the backward has come; in the first forward there are those of the step
before, which Lightning frees after it. Slices that are fetched ahead count for as long as there are blocks to gather.
Where shards are in host memory, sums that hop 2 will reduce are on the device until it does, and its results until the
backward has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from operator import and_

from lightning_mics.policy.activations import ALL_SAVED, Phase
from lightning_mics.policy.workload import Elements, Workload
from lightning_mics.sharding.modules.frozen_blocks import units_on_ranks
from lightning_mics.sharding.options import CommunicationOptions, size_of_share
from lightning_mics.techniques.cache_offload import AT_ONCE
from lightning_mics.topology import Topology

FORWARD: tuple[Phase, ...] = ("start", "forward", "gather", "loss")


LEFT: dict[Phase, int] = {"blocks": 3, "second": 2, "between": 1, "first": 1, "end": 0, "reduced": 0}  # to be reduced


STEP_COUNTER_BYTES = 4  # Adam's, for each parameter


SCALARS_BYTES = 2**14  # the loss, norms, a batch of a few numbers, and other small tensors


def step_bytes(
    work: Workload,
    topology: Topology,
    communication: CommunicationOptions,
    *,
    samples: int,
    micro_steps: int | None,
    reshard_after_forward: bool | int = True,
) -> int:
    """Bytes of tensors on each rank at the peak of an optimizer step.

    Args:
        work: The work of the model.
        topology: Topology of the job.
        communication: Options of the collectives, without "auto".
        samples: Samples of a micro-batch.
        micro_steps: Micro-steps per optimizer step; None if the number is not known.
        reshard_after_forward: FSDP2's option: False keeps blocks unsharded until their backward, a number of ranks
            keeps them spread over so many.
    """
    if micro_steps is None:
        return max(step_bytes(work, topology, communication, samples=samples, micro_steps=count) for count in (1, 3))
    step = _Step(work, topology, communication, samples=samples, micro_steps=micro_steps, reshard=reshard_after_forward)
    taken = work.activations.peaks(samples)
    return math.ceil(max(step.update, *(step.phase(phase) + peak for phase, peak in taken.items())))


@dataclass(frozen=True)
class _Size:
    """Bytes of parameter groups, unsharded and as they are reduced."""

    gathered: float
    reduced: float


def _on_nodes(place: str | float, elements: Elements) -> int:
    """Elements of the parameter groups that are cached, or accumulated, on nodes."""
    if isinstance(place, str):
        return elements.total if place == "node" else 0
    return size_of_share(elements.blocks, place)


@dataclass(frozen=True)
class _Passing:
    """Bytes of the slices of the root and of a block that pass through the device on their way to and from the host."""

    root: float
    block: float

    def at_once(self, *, with_root: bool = False, of_blocks: int = AT_ONCE) -> float:
        """Bytes of the slices that are there.

        Args:
            with_root: Whether that of the root is one of them.
            of_blocks: Number of slices of blocks that there were until now.
        """
        of_root = 1 if with_root and self.root else 0
        return of_root * self.root + min(AT_ONCE - of_root, of_blocks) * self.block


def _passing(place: str | float, root: float, block: float) -> _Passing:
    if isinstance(place, str):
        return _Passing(root, block) if place == "node" else _Passing(0, 0)
    return _Passing(0, block)


@dataclass(frozen=True, kw_only=True)
class _Freed:
    """Bytes of unsharded parameters that FSDP2 frees after their use: 0 where ranks cache them.

    Attributes:
        root: The root's.
        any: Those of the largest block.
        several: The same, if it is not the only one.
        last: Those of the last block.
        ahead: Those of the block before it.
        pair: Most of two neighbors, neither of which is the last.
        first: Those of the first block.
        second: Those of the second block.
        held_behind: Number of blocks after the last that is freed.
    """

    root: float
    any: float
    several: float
    last: float
    ahead: float
    pair: float
    first: float
    second: float
    held_behind: int = 0

    @classmethod
    def of(cls, root: float, blocks: Sequence[float]) -> _Freed:
        """The bytes of a model some of whose blocks are cached on ranks, and have 0 here."""
        largest = max(blocks, default=0)
        count = sum(map(bool, blocks))
        padded = [0, 0, *(largest if block else 0 for block in blocks)]
        pairs = [one + other for one, other in pairwise(padded[:-1])]
        return cls(
            root=root,
            any=largest,
            several=largest if count > 1 else 0,
            last=padded[-1],
            ahead=padded[-2],
            pair=max(pairs),
            first=padded[2] if blocks else 0,
            second=padded[3] if len(blocks) > 1 else 0,
            held_behind=next((number for number, block in enumerate(reversed(blocks)) if block), len(blocks)),
        )

    @classmethod
    def alike(cls, root: float, block: float) -> _Freed:
        """The bytes of a model in which nothing is cached on ranks."""
        return cls(
            root=root, any=block, several=block, last=block, ahead=block, pair=2 * block, first=block, second=block
        )


def _itemsizes(work: Workload) -> tuple[float, float]:
    """Bytes of an element as it is gathered, and as it is reduced: the mean where frozen ones may have other dtypes."""
    all_elements, trained = work.elements(1), work.elements(1, trained=True)
    if trained.total in (0, all_elements.total):
        return work.gathered_dtype.itemsize, work.reduce_dtype.itemsize
    return work.size.gathered_bytes / all_elements.total, work.size.reduced_bytes / trained.total


def _saved_behind(work: Workload, samples: int, *, blocks: int) -> float:
    """Bytes of activations that the last blocks have not saved yet in the forward of the block before them.

    Args:
        work: The work of the model.
        samples: Samples of a micro-batch.
        blocks: Number of blocks; 0 bytes are safe where blocks save different amounts.
    """
    elements = work.elements(1).blocks
    are_alike = len(set(elements)) == 1 and work.recomputed_share in (None, 0.0, 1.0)
    return blocks * samples * work.activations.saved if are_alike else 0.0


class _Step:
    """Bytes in each phase of the micro-steps of an optimizer step, without activations."""

    def __init__(
        self,
        work: Workload,
        topology: Topology,
        communication: CommunicationOptions,
        *,
        samples: int,
        micro_steps: int,
        reshard: bool | int = True,
    ) -> None:
        self._ranks, self._micro_steps, self._reshard = topology.partition_size, micro_steps, reshard
        wide, reduced = _itemsizes(work)
        elements, trained = work.elements(self._ranks), work.elements(self._ranks, trained=True)
        self._root = _Size(elements.root * wide, trained.root * reduced)
        self._block = _Size(elements.largest * wide, trained.largest * reduced)
        self._all = _Size(elements.total * wide, trained.total * reduced)
        self._blocks = len(elements.blocks)
        self._nearest = [count * reduced for count in trained.nearest]  # of the first and the second block
        padded = elements.total / (work.elements(1).total or 1)
        states = work.size.states_bytes - work.size.gradients_bytes
        self._gradients = padded * work.size.gradients_bytes / self._ranks
        self._states = padded * states / self._ranks + work.size.buffers_bytes
        self._states += SCALARS_BYTES + (0 if work.size.offload else STEP_COUNTER_BYTES * work.parameter_tensors)
        self._cache = communication.cache_parameters if self._ranks > 1 else "never"
        self._sums = communication.accumulate_gradients if self._ranks > 1 and micro_steps > 1 else "shard"
        local = topology.local_ranks_per_partition_group
        in_stages = topology.spans_nodes and (communication.hierarchical is not False or local == 1)
        flat = topology.spans_nodes and not in_stages and communication.caches_on_nodes
        self._place(work, communication, wide=wide, local=local, flat=flat)
        self._saved_behind = _saved_behind(work, samples, blocks=self._freed.held_behind)
        self._slices = self._slices_of_sums = _Passing(0, 0)
        if communication.cache_offload:
            self._slices = _passing(self._cache, self._root.gathered / local, self._block.gathered / local)
            self._slices_of_sums = _passing(self._sums, self._root.reduced / local, self._block.reduced / local)
        else:
            self._states += _on_nodes(self._sums, trained) * reduced / local
        self._fetched = communication.units_ahead * self._block.gathered / local if in_stages else 0.0
        if self._cache == "node":  # slices are fetched into the cache
            self._fetched = 0.0
        none_left: tuple[Phase, ...] = ("second", "between", "first", "end", "reduced")  # to fetch, in backward
        self._none_left = none_left if len(elements.blocks) > 2 else ("last", "blocks", *none_left)
        self._kept_of_reductions = work.size.cast_bytes / self._ranks if topology.replicas > 1 else 0.0
        if topology.replicas > 1 and micro_steps > 1 and not communication.two_hop:
            self._kept_of_reductions += self._all.reduced / self._ranks
        self._adds_up_apart = self._sums in ("node", "rank")  # not those of other blocks, beside a share
        if topology.replicas > 1 and micro_steps > 1 and communication.inter_node_reduce_dtype is not None:
            self._adds_up_apart = True  # the second hop is not FSDP2's
            self._states += self._all.reduced / self._ranks
        self._sums_of_shards = self._gradients
        own_hop_2 = topology.replicas > 1 and communication.inter_node_reduce_dtype is None
        if work.size.offload is True and own_hop_2:
            if micro_steps > 1 and not self._adds_up_apart and communication.two_hop:
                self._sums_of_shards = self._all.reduced / self._ranks  # until hop 2 reduces them
            else:
                self._kept_of_reductions = self._all.reduced / self._ranks  # FSDP2 keeps results of hop 2

    def _place(
        self, work: Workload, communication: CommunicationOptions, *, wide: float, local: int, flat: bool
    ) -> None:
        """Count what is cached, on nodes and on ranks, and what is left to gather and free."""
        elements, trained = work.elements(self._ranks), work.elements(self._ranks, trained=True)
        of_units, trained_of = (elements.root, *elements.blocks), (trained.root, *trained.blocks)
        share = float(communication.frozen_on_ranks) if self._ranks > 1 else 0.0
        on_ranks = [self._cache == "rank"] * len(of_units)
        if share and self._cache != "rank":
            on_ranks = units_on_ranks(work.sizes, share)
        self._held = wide * sum(compress(of_units, on_ranks))  # on each rank
        has_frozen = [total > part for total, part in zip(of_units, trained_of, strict=True)]
        self._held_between_steps = wide * sum(compress(of_units, map(and_, on_ranks, has_frozen)))
        gathered_again = [  # where all of a unit trains it is gathered as a whole, else what trains is by itself
            total if total == part else part * (1 + 1 / self._ranks)
            for total, part, on_rank in zip(of_units[1:], trained_of[1:], on_ranks[1:], strict=True)
            if on_rank or (flat and total != part)
        ]
        self._again = wide * max(gathered_again, default=0)
        self._last_is_held = on_ranks[-1]
        left = [0 if on_rank else count for count, on_rank in zip(of_units, on_ranks, strict=True)]
        if not communication.cache_offload:
            self._states += _on_nodes(self._cache, Elements.of(left[0], tuple(left[1:]))) * wide / local
        if any(on_ranks):
            self._freed = _Freed.of(wide * left[0], [wide * count for count in left[1:]])
        else:
            self._freed = _Freed.alike(self._root.gathered, self._block.gathered)

    @property
    def update(self) -> float:
        """Bytes in the update of the weights, by a fused optimizer."""
        return self._states + self._held_between_steps + self._gradients

    def phase(self, phase: Phase) -> float:
        """Most bytes in a phase of any micro-step."""
        if phase in FORWARD:
            first = self._gathered(phase) + self._gradients  # of the step before
            sums = self._all.reduced if self._sums == "rank" else 0
            return self._states + max(first, self._gathered(phase, again=True) + sums)
        boundary = self._gathered(phase) + self._reducing(phase) + self._sharded_gradients(phase)
        if self._sums != "rank":
            return self._states + boundary
        before = self._gathered(phase) + self._all.reduced  # the micro-step before the boundary
        return self._states + max(before, boundary + self._all.reduced - self._reduced_before(phase))

    def _gathered(self, phase: Phase, *, again: bool = False) -> float:
        """Bytes of unsharded parameters.

        Args:
            phase: Phase of the micro-step.
            again: Whether it is not the first micro-step, so that cached parameters are there.
        """
        fetched = 0.0 if phase in self._none_left else self._fetched
        return fetched + self._slices.at_once(with_root=phase == "start") + self._gathered_by_fsdp2(phase, again=again)

    def _gathered_by_fsdp2(self, phase: Phase, *, again: bool) -> float:
        freed, times = self._freed, {"start": 1, "forward": 1, "gather": 2, "loss": 1}.get(phase, 0)
        held = self._held + (0 if again else times * self._again)
        sent = 1 if self._ranks > 1 else 0  # one rank copies its shard
        if self._reshard is False and phase in ALL_SAVED:
            return self._all.gathered + sent * times * self._block.gathered
        if self._reshard is not True and phase in ALL_SAVED:
            held += self._all.gathered / int(self._reshard)
        of_phase: dict[Phase, float] = {
            "start": (1 + sent) * (freed.root + freed.first),
            "forward": freed.root + max(sent * freed.any, (1 + sent) * freed.any - self._saved_behind),
            "gather": freed.root
            + max(sent * freed.any, freed.any + sent * (freed.any + freed.several) - self._saved_behind),
            "loss": freed.root + sent * freed.any,
            "head": freed.root + sent * freed.last,
            "last": freed.root + freed.last + sent * freed.ahead,
            "blocks": freed.root + freed.pair if sent else freed.root + freed.any,
            "second": freed.root + freed.second + sent * freed.first,
            "between": freed.root + freed.first + sent * max(freed.first, freed.second),
            "first": freed.root + freed.first,
            "end": freed.root,
            "reduced": 0,
        }
        return held + of_phase[phase]

    def _reducing(self, phase: Phase) -> float:
        """Bytes of gradients that are reduced, and of what FSDP2 keeps of reductions until the backward has ended."""
        taken = 0.0
        if phase in ("blocks", "second", "between", "first", "end") and len(self._nearest) > 1:
            taken = self._block.reduced
            if self._ranks == 1 and phase != "end":  # its result is as large
                taken += max(0, self._block.reduced - self._block.gathered)
        elif phase == "last" and self._last_is_held:  # no reshard makes room for it
            taken = self._block.reduced
        elif phase == "reduced":
            taken = self._root.reduced * (1 + 1 / self._ranks)
        if phase in LEFT:
            begun = max(1, self._blocks - LEFT[phase])
            taken += self._slices_of_sums.at_once(with_root=phase == "reduced", of_blocks=begun)
        return taken + self._kept_of_reductions * self._reduced_before(phase) / (self._all.reduced or 1)

    def _reduced_before(self, phase: Phase) -> float:
        """Bytes of gradients, unsharded, that the backward has reduced when the phase begins."""
        left = {"second": 2, "between": 1, "first": 1, "end": 0, "reduced": 0}
        if phase == "blocks":
            return self._block.reduced
        if phase not in left:
            return 0
        return max(0, self._all.reduced - self._root.reduced - sum(self._nearest[: left[phase]]))

    def _sharded_gradients(self, phase: Phase) -> float:
        if self._micro_steps > 1 and not self._adds_up_apart:
            return self._sums_of_shards
        if phase == "reduced":
            return self._gradients
        return self._gradients * self._reduced_before(phase) / (self._all.reduced or 1)
