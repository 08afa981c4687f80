"""The collectives of one optimizer step, computed from the shapes of parameters and the options.

A rehearsal runs the program, which takes a minute for a large model; this takes a millisecond, so that all partition
sizes can be compared. The tests check that both agree.

FSDP2 shards each parameter over its first dimension, padded to a multiple of the ranks, and gathers and reduces all of
a parameter group at once. The root is gathered in the first forward of each micro-step only; blocks are gathered in
forward and in backward, with ``allow_unused`` in forward only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from lightning_mics.collectives.traffic import Kind, Sent, part_of, sent_by
from lightning_mics.cost.collective import Collective
from lightning_mics.sharding.blocks import group_modules
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.techniques.partition_groups import choose_hierarchical
from lightning_mics.topology import Topology


@dataclass(frozen=True)
class Unit:
    """A parameter group of FSDP2: parameters that are gathered and reduced by one collective.

    Attributes:
        parameters: Number of rows and number of elements per row, of each parameter.
        is_root: Whether these are the parameters outside of all blocks.
    """

    parameters: tuple[tuple[int, int], ...]
    is_root: bool

    def elements(self, ranks: int) -> int:
        """Number of elements of all parameters, padded so that ``ranks`` have equal shards."""
        return sum(-(-rows // ranks) * ranks * width for rows, width in self.parameters)


def find_units(model: nn.Module, blocks: Mapping[str, nn.Module]) -> list[Unit]:
    """Find the parameter groups of a model, in the order of forward: the root, then its blocks.

    Args:
        model: The model, which may be on the meta device.
        blocks: Blocks of the model, by FQN.
    """
    modules = {model: True} | dict.fromkeys(reversed(list(blocks.values())), False)
    return [Unit(_shapes(unit, set(blocks.values())), is_root) for unit, is_root in modules.items()]


def _shapes(unit: nn.Module, blocks: set[nn.Module]) -> tuple[tuple[int, int], ...]:
    own = {parameter for module in group_modules(unit, blocks) for parameter in module.parameters(recurse=False)}
    return tuple(sorted((p.shape[0], p.numel() // max(1, p.shape[0])) for p in own))


When = Literal["every", "first", "boundary"]


@dataclass(frozen=True)
class ScheduledCollective:
    """A collective of an optimizer step.

    Attributes:
        collective: The collective.
        times: Number of runs in each of these micro-steps.
        when: Micro-steps in which it runs: "every", the "first", or the one at the "boundary".
    """

    collective: Collective
    times: int
    when: When

    def in_step(self, micro_steps: int) -> int:
        """Number of runs in an optimizer step of ``micro_steps`` micro-steps."""
        return self.times * (micro_steps if self.when == "every" else 1)


def step_traffic(
    units: Sequence[Unit],
    topology: Topology,
    *,
    communication: CommunicationOptions = CommunicationOptions.PAPER,
    gathered_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
) -> list[ScheduledCollective]:
    """List the collectives of rank 0 on NCCL in one optimizer step of automatic optimization, without clipping.

    Args:
        units: Parameter groups of the model, the root first, from :func:`find_units`; one alone where the options are
            those of a unit.
        topology: Topology of the job.
        communication: Options of the collectives, without "auto".
        gathered_dtype: Dtype of unsharded parameters.
        reduce_dtype: Dtype of gradient sums.

    Raises:
        ValueError: If ``communication`` leaves "auto" to a policy, or its ``hierarchical`` does not fit the topology.
    """
    communication.check_chosen()
    in_stages = choose_hierarchical(communication.hierarchical, topology)
    traffic = []
    for unit, options in zip(units, communication.by_unit(blocks=len(units) - 1), strict=True):
        step = _Step(topology, options, in_stages)
        traffic += [*step.gathers(unit, gathered_dtype), *step.reductions(unit, reduce_dtype)]
    return [repeated for repeated in traffic if repeated.collective.ranks > 1]


def full_sharding_traffic(
    units: Sequence[Unit],
    topology: Topology,
    *,
    reshard_after_forward: bool | int,
    communication: CommunicationOptions,
    gathered_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> list[ScheduledCollective]:
    """List the collectives of rank 0 under plain FSDP2 with this ``reshard_after_forward``.

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
    once = [replace(each, times=1) if each.collective.kind == "all_gather" else each for each in traffic]
    if reshard_after_forward is False:
        return once
    step = _Step(topology, communication, hierarchical=False)
    blocks = [unit.elements(topology.partition_size) for unit in units if not unit.is_root]
    in_nodes = [step.run("all_gather", "node", elements, gathered_dtype, when="every") for elements in blocks]
    return once + [each for each in in_nodes if each.collective.ranks > 1]


def total_sent(traffic: Iterable[ScheduledCollective], *, micro_steps: int) -> Sent:
    """Bytes that rank 0 sends in an optimizer step.

    Args:
        traffic: Collectives of the step, from :func:`step_traffic`.
        micro_steps: Micro-steps per optimizer step.
    """
    total = Sent()
    for repeated in traffic:
        sent, times = repeated.collective.sent, repeated.in_step(micro_steps)
        total += Sent(sent.inside_bytes * times, sent.between_bytes * times)
    return total


@dataclass(frozen=True)
class _Uses:
    times: int
    when: When


@dataclass(frozen=True)
class _Step:
    topology: Topology
    options: CommunicationOptions
    hierarchical: bool

    @property
    def _in_stages(self) -> bool:
        return self.hierarchical or (self.topology.spans_nodes and self.topology.local_ranks_per_partition_group == 1)

    def gathers(self, unit: Unit, dtype: torch.dtype) -> list[ScheduledCollective]:
        elements = unit.elements(self.topology.partition_size)
        once, always = _Uses(1, "first"), _Uses(1 if unit.is_root or self.options.allow_unused else 2, "every")
        every = once if self.options.cache_parameters == "rank" else always
        if not self._in_stages:
            return [self.run("all_gather", "partition", elements, dtype, times=every.times, when=every.when)]
        k = self.topology.local_ranks_per_partition_group
        crossing = always if self.options.cache_parameters == "never" else once
        rail = self.run("all_gather", "rail", elements // k, dtype, times=crossing.times, when=crossing.when)
        return [rail, self.run("all_gather", "node", elements, dtype, times=every.times, when=every.when)]

    def reductions(self, unit: Unit, dtype: torch.dtype) -> list[ScheduledCollective]:
        p, k = self.topology.partition_size, self.topology.local_ranks_per_partition_group
        elements = unit.elements(p)
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

    def _second_hop(self, shard: int, dtype: torch.dtype, when: When) -> list[ScheduledCollective]:
        wire, replicas = self.options.inter_node_reduce_dtype, self.topology.replicas
        if wire is None:
            return [self.run("all_reduce", "replication", shard, dtype, when=when)]
        padded = part_of(shard, replicas) * replicas
        kinds: tuple[Kind, Kind] = ("all_to_all", "all_gather")
        return [self.run(kind, "replication", padded, wire, when=when) for kind in kinds]

    def run(
        self, kind: Kind, group: str, elements: int, dtype: torch.dtype, *, when: When, times: int = 1
    ) -> ScheduledCollective:
        ranks = self._members(group)
        nodes = [self.topology.node_of(rank) for rank in ranks]
        name = "partition" if ranks == self._members("partition") else group
        sent = sent_by(kind, elements * dtype.itemsize, nodes=nodes, position=0)
        collective = Collective(
            kind=kind, group=name, ranks=len(ranks), nodes=len(set(nodes)), dtype=dtype, elements=elements, sent=sent
        )
        return ScheduledCollective(collective, times, when)

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
