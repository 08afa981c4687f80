"""The collectives of one optimizer step, computed from the shapes of parameters and the options.

A rehearsal runs the program, which takes a minute for a large model; this takes a millisecond, so that all partition
sizes can be compared. The tests check that both agree.

Each parameter is sharded along one dim (:mod:`~lightning_mics.techniques.sharded_dim`), padded to a multiple of the
ranks, and FSDP2 gathers and reduces all of a parameter group at once. The root is gathered in the first forward of each
micro-step only; blocks are gathered in forward and in backward, with ``allow_unused`` in forward only. Gradients of
frozen parameters are not reduced, and where these are cached, they are not gathered in any step but the first, which is
not counted. Blocks that no gradient reaches are gathered in forward only
(:func:`~lightning_mics.sharding.modules.frozen_blocks.used_in_backward`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Literal

import torch
from torch import nn

from lightning_mics.collectives.traffic import Kind, Sent, part_of, sent_by
from lightning_mics.cost.collective import Collective
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.modules.frozen_blocks import UnitSize, used_in_backward
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.techniques.partition_groups import choose_hierarchical
from lightning_mics.techniques.sharded_dim import padded_numel
from lightning_mics.topology import Topology


@dataclass(frozen=True)
class Unit:
    """A parameter group of FSDP2: parameters that are gathered and reduced by one collective.

    Attributes:
        parameters: Shape of each parameter.
        is_root: Whether these are the parameters outside of all blocks.
        trained: The same of those that require gradients; None if all do.
    """

    parameters: tuple[tuple[int, ...], ...]
    is_root: bool
    trained: tuple[tuple[int, ...], ...] | None = None

    def elements(self, ranks: int) -> int:
        """Number of elements of all parameters, padded so that ``ranks`` have equal shards."""
        return _elements(self.parameters, ranks)

    def trained_elements(self, ranks: int) -> int:
        """Number of elements of the parameters that require gradients, padded likewise."""
        return _elements(self.parameters if self.trained is None else self.trained, ranks)


@lru_cache(maxsize=4096)  # blocks are alike, and there are many plans
def _elements(parameters: tuple[tuple[int, ...], ...], ranks: int) -> int:
    return sum(padded_numel(shape, ranks) for shape in parameters)


def find_units(model: nn.Module, blocks: Mapping[str, nn.Module]) -> list[Unit]:
    """Find the parameter groups of a model, in the order of forward: the root, then its blocks.

    Args:
        model: The model, which may be on the meta device.
        blocks: Blocks of the model, by FQN.
    """
    modules = {model: True} | dict.fromkeys(reversed(list(blocks.values())), False)
    return [_unit(unit, set(blocks.values()), is_root) for unit, is_root in modules.items()]


def _unit(module: nn.Module, blocks: set[nn.Module], is_root: bool) -> Unit:
    own = {parameter for inner in group_modules(module, blocks) for parameter in inner.parameters(recurse=False)}
    trained = {parameter for parameter in own if parameter.requires_grad}
    return Unit(_shapes(own), is_root, None if trained == own else _shapes(trained))


def unit_sizes(units: Iterable[Unit]) -> list[UnitSize]:
    """Elements of each parameter group, and those of them that require gradients."""
    return [(unit.elements(1), unit.trained_elements(1)) for unit in units]


def _shapes(parameters: Iterable[nn.Parameter]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(tuple(parameter.shape) for parameter in parameters))


When = Literal["every", "first", "later", "boundary"]
Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class ScheduledCollective:
    """A collective of an optimizer step.

    Attributes:
        collective: The collective.
        phases: Phases of each of these micro-steps in which it runs, once in each.
        when: Micro-steps in which it runs: "every", the "first", those "later", or the one at the "boundary".
    """

    collective: Collective
    phases: tuple[Phase, ...]
    when: When

    def in_step(self, micro_steps: int) -> int:
        """Number of runs in an optimizer step of ``micro_steps`` micro-steps."""
        times = {"every": micro_steps, "later": micro_steps - 1}.get(self.when, 1)
        return len(self.phases) * times


@dataclass(frozen=True)
class UnitTraffic:
    """The collectives of one parameter group in an optimizer step.

    Attributes:
        unit: The parameter group.
        collectives: Gathers, then reductions, in the order in which they run.
        slice_bytes: Bytes of a rank's part of the cache that waits on the host; 0 if none does.
        sum_bytes: Bytes of a rank's part of the sum that waits on the host; 0 if none does.
    """

    unit: Unit
    collectives: tuple[ScheduledCollective, ...]
    slice_bytes: int = 0
    sum_bytes: int = 0


@dataclass(frozen=True)
class StepTraffic:
    """The collectives of one optimizer step.

    Attributes:
        units: Collectives of each parameter group, the root first.
    """

    units: tuple[UnitTraffic, ...]

    def __iter__(self) -> Iterator[ScheduledCollective]:
        for unit in self.units:
            yield from unit.collectives

    def sent(self, micro_steps: int) -> Sent:
        """Bytes that rank 0 sends in an optimizer step of ``micro_steps`` micro-steps."""
        every, once = self._sent
        return Sent(
            every.inside_bytes * micro_steps + once.inside_bytes, every.between_bytes * micro_steps + once.between_bytes
        )

    def on_host_bytes(self, micro_steps: int) -> int:
        """Bytes of caches and sums of a rank that wait on the host in an optimizer step of ``micro_steps``."""
        return sum(unit.slice_bytes + (unit.sum_bytes if micro_steps > 1 else 0) for unit in self.units)

    @cached_property
    def _sent(self) -> tuple[Sent, Sent]:
        """Bytes in each micro-step, and in one of them only."""
        every, once = Sent(), Sent()
        for repeated in self:
            sent, times = repeated.collective.sent, len(repeated.phases)
            if repeated.when in ("every", "later"):
                every += Sent(sent.inside_bytes * times, sent.between_bytes * times)
            if repeated.when == "later":  # in all but one
                times = -times
            if repeated.when != "every":
                once += Sent(sent.inside_bytes * times, sent.between_bytes * times)
        return every, once


def step_traffic(
    units: Sequence[Unit],
    topology: Topology,
    *,
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    gathered_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
) -> StepTraffic:
    """The collectives of rank 0 on NCCL in one optimizer step of automatic optimization, without clipping.

    Args:
        units: Parameter groups of the model, the root first, from :func:`find_units`.
        topology: Topology of the job.
        communication: Options of the collectives, without "auto".
        gathered_dtype: Dtype of unsharded parameters.
        reduce_dtype: Dtype of gradient sums.

    Raises:
        ValueError: If ``communication`` leaves "auto" to a policy, or its ``hierarchical`` does not fit the topology.
    """
    communication.check_chosen()
    in_stages = choose_hierarchical(communication.hierarchical, topology)
    sizes = unit_sizes(units)
    of_kind: dict[tuple[Unit, CommunicationOptions, bool], UnitTraffic] = {}  # blocks are alike
    kinds = list(zip(units, communication.by_unit(sizes=sizes), used_in_backward(sizes), strict=True))
    for kind in kinds:
        if kind not in of_kind:
            unit, options, in_backward = kind
            step = _Step(topology, options, in_stages, in_backward=in_backward)
            collectives = [*step.gathers(unit, gathered_dtype), *step.reductions(unit, reduce_dtype)]
            of_kind[kind] = _more_than_one_rank(unit, collectives)
            if options.cache_offload:
                of_kind[kind] = step.on_host(of_kind[kind], gathered_dtype, reduce_dtype)
    return StepTraffic(tuple(of_kind[kind] for kind in kinds))


def _more_than_one_rank(unit: Unit, collectives: Iterable[ScheduledCollective]) -> UnitTraffic:
    return UnitTraffic(unit, tuple(repeated for repeated in collectives if repeated.collective.ranks > 1))


def full_sharding_traffic(
    units: Sequence[Unit],
    topology: Topology,
    *,
    reshard_after_forward: bool | int,
    communication: CommunicationOptions,
    gathered_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> StepTraffic:
    """The collectives of rank 0 under plain FSDP2 with this ``reshard_after_forward``.

    Args:
        units: Parameter groups of the model, from :func:`find_units`.
        topology: Topology of the job, with one partition group.
        reshard_after_forward: True gathers blocks in forward and backward over all ranks; False in forward only; the
            number of ranks of a node gathers them inside nodes in backward.
        communication: Options of the collectives, with flat ones.
        gathered_dtype: Dtype of unsharded parameters.
        reduce_dtype: Dtype of gradient sums.
    """
    traffic = step_traffic(
        units, topology, communication=communication, gathered_dtype=gathered_dtype, reduce_dtype=reduce_dtype
    )
    if reshard_after_forward is True:
        return traffic
    step = _Step(topology, communication, hierarchical=False)

    @cache
    def kept(traffic: UnitTraffic) -> UnitTraffic:
        once: list[ScheduledCollective] = [
            replace(each, phases=("forward",)) if each.collective.kind == "all_gather" else each
            for each in traffic.collectives
        ]
        if reshard_after_forward is not False and not traffic.unit.is_root:
            elements = traffic.unit.elements(topology.partition_size)
            once.insert(1, step.run("all_gather", "node", elements, gathered_dtype, when="every", phases=("backward",)))
        return _more_than_one_rank(traffic.unit, once)

    return StepTraffic(tuple(map(kept, traffic.units)))


@dataclass(frozen=True)
class _Uses:
    phases: tuple[Phase, ...]
    when: When


@dataclass(frozen=True)
class _Step:
    topology: Topology
    options: CommunicationOptions
    hierarchical: bool
    in_backward: bool = True  # whether the backward uses the weights

    @property
    def _in_stages(self) -> bool:
        return self.hierarchical or (self.topology.spans_nodes and self.topology.local_ranks_per_partition_group == 1)

    def gathers(self, unit: Unit, dtype: torch.dtype) -> list[ScheduledCollective]:
        elements = unit.elements(self.topology.partition_size)
        trained = unit.trained_elements(self.topology.partition_size)
        if self.options.cache_parameters == "rank":
            elements = trained
        once = _Uses(("forward",), "first")
        stays = unit.is_root or self.options.allow_unused or not self.in_backward
        always = _Uses(("forward",) if stays else ("forward", "backward"), "every")
        every = once if self.options.cache_parameters == "rank" else always
        if not self._in_stages:
            if self.options.cache_parameters == "node" and self.topology.spans_nodes:
                return self._flat_gathers(elements, trained, dtype, stays=stays)
            flat = self.run("all_gather", "partition", elements, dtype, phases=every.phases, when=every.when)
            return [flat] if elements else []
        k = self.topology.local_ranks_per_partition_group
        crossing = always if self.options.cache_parameters == "never" else once
        on_rail = trained if self.options.cache_parameters == "node" else elements
        rail = self.run("all_gather", "rail", on_rail // k, dtype, phases=crossing.phases, when=crossing.when)
        in_node = self.run("all_gather", "node", elements, dtype, phases=every.phases, when=every.when)
        return [*([rail] if on_rail else []), *([in_node] if elements else [])]

    def _flat_gathers(
        self, elements: int, trained: int, dtype: torch.dtype, *, stays: bool
    ) -> list[ScheduledCollective]:
        """Gathers of a unit over all ranks, once, and from the caches of nodes, where frozen weights always are."""
        in_node = partial(self.run, "all_gather", "node", elements, dtype)
        found = [self.run("all_gather", "partition", trained, dtype, phases=("forward",), when="first")] * bool(trained)
        found.append(in_node(phases=("forward",), when="later" if trained == elements else "every"))
        return found if stays else [*found, in_node(phases=("backward",), when="every")]

    def reductions(self, unit: Unit, dtype: torch.dtype) -> list[ScheduledCollective]:
        p, k = self.topology.partition_size, self.topology.local_ranks_per_partition_group
        elements = unit.trained_elements(p)
        if not elements:
            return []
        every = _when(self.options.accumulate_gradients == "rank")
        if self._in_stages:
            wire = self.options.inter_node_reduce_dtype
            rail: Kind = "reduce_scatter" if wire is None else "all_to_all"
            crossing = _when(self.options.accumulate_gradients != "shard")
            first = [
                self.run("reduce_scatter", "node", elements, dtype, when=every),
                self.run(rail, "rail", elements // k, wire or dtype, when=crossing),
            ]
        else:
            first = [self.run("reduce_scatter", "partition", elements, dtype, when=every)]
        return [*first, *self._second_hop(elements // p, dtype, _when(self.options.two_hop))]

    def on_host(self, traffic: UnitTraffic, gathered_dtype: torch.dtype, reduce_dtype: torch.dtype) -> UnitTraffic:
        """The collectives of a unit with what of it waits on the host.

        Args:
            traffic: Collectives of the unit.
            gathered_dtype: Dtype of unsharded parameters.
            reduce_dtype: Dtype of gradient sums.
        """
        p, k, unit = self.topology.partition_size, self.topology.local_ranks_per_partition_group, traffic.unit
        cached, summed = (
            self._in_stages and place == "node"
            for place in (self.options.cache_parameters, self.options.accumulate_gradients)
        )
        return replace(
            traffic,
            slice_bytes=unit.elements(p) * gathered_dtype.itemsize // k if cached else 0,
            sum_bytes=unit.trained_elements(p) * reduce_dtype.itemsize // k if summed else 0,
        )

    def _second_hop(self, shard: int, dtype: torch.dtype, when: When) -> list[ScheduledCollective]:
        wire, replicas = self.options.inter_node_reduce_dtype, self.topology.replicas
        if wire is None:
            return [self.run("all_reduce", "replication", shard, dtype, when=when)]
        padded = part_of(shard, replicas) * replicas
        kinds: tuple[Kind, Kind] = ("all_to_all", "all_gather")
        return [self.run(kind, "replication", padded, wire, when=when) for kind in kinds]

    def run(
        self,
        kind: Kind,
        group: str,
        elements: int,
        dtype: torch.dtype,
        *,
        when: When,
        phases: tuple[Phase, ...] = ("backward",),
    ) -> ScheduledCollective:
        ranks = self._members(group)
        nodes = [self.topology.node_of(rank) for rank in ranks]
        name = "partition" if ranks == self._members("partition") else group
        sent = sent_by(kind, elements * dtype.itemsize, nodes=nodes, position=0)
        collective = Collective(
            kind=kind, group=name, ranks=len(ranks), nodes=len(set(nodes)), dtype=dtype, elements=elements, sent=sent
        )
        return ScheduledCollective(collective, phases, when)

    def _members(self, group: str) -> tuple[int, ...]:
        if group == "replication":
            return self.topology.replication_group(0)
        if group == "rail":
            return self.topology.rail(0)
        if group == "node":
            return self.topology.node_group(0)
        ranks = self.topology.partition_group(0)
        return ranks if self.hierarchical else tuple(sorted(ranks))


def _when(at_boundary: bool) -> When:
    return "boundary" if at_boundary else "every"
