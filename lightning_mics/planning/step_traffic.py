"""The collectives of one optimizer step, from the shapes of parameters and the options: what a rehearsal would see.

A rehearsal runs the program, which takes a minute for a large model; this takes a millisecond, so that all partition
sizes can be compared. The tests hold one against the other.

FSDP2 shards each parameter over its first dimension, padded to a multiple of the ranks, and gathers and reduces all of
a unit's at once. The root is gathered in the first forward of each micro-step only; blocks are gathered in forward and
in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mics.blocks import unit_modules
from lightning_mics.planning.collectives import Collective
from lightning_mics.planning.once_per_step import OncePerStepOptions
from lightning_mics.topology import Topology
from lightning_mics.traffic import Kind, Sent, sent_by

EVERY_TIME: OncePerStepOptions = {
    "cross_node_gather": "every_use",
    "cross_node_reduce": "every_micro_step",
    "in_node_gather": "every_use",
    "in_node_reduce": "every_micro_step",
}


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers and reduces at once.

    Attributes:
        parameters: Rows and elements per row of each.
        is_root: Whether it is what no block holds.
    """

    parameters: tuple[tuple[int, int], ...]
    is_root: bool

    def elements(self, ranks: int) -> int:
        """Of all parameters, padded so that ``ranks`` have equal parts."""
        return sum(-(-rows // ranks) * ranks * width for rows, width in self.parameters)


def find_units(model: nn.Module, blocks: Mapping[str, nn.Module]) -> list[Unit]:
    """The units of ``model``, in the order of forward: the root, then its blocks. It may be on the meta device."""
    modules = {model: True} | dict.fromkeys(reversed(list(blocks.values())), False)
    return [Unit(_shapes(unit, set(blocks.values())), is_root) for unit, is_root in modules.items()]


def _shapes(unit: nn.Module, blocks: set[nn.Module]) -> tuple[tuple[int, int], ...]:
    own = {parameter for module in unit_modules(unit, blocks) for parameter in module.parameters(recurse=False)}
    return tuple(sorted((p.shape[0], p.numel() // p.shape[0]) for p in own))


@dataclass(frozen=True)
class Repeated:
    """A collective and how often it runs in an optimizer step."""

    collective: Collective
    times: int


def step_traffic(
    units: Sequence[Unit],
    topology: Topology,
    *,
    micro_steps: int,
    hierarchical: bool,
    once_per_step: OncePerStepOptions = EVERY_TIME,
    two_hop: bool = True,
    gathered_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    cross_node_dtype: torch.dtype | None = None,
) -> list[Repeated]:
    """What rank 0 runs on NCCL in one optimizer step of automatic optimization; clipping apart.

    Args:
        units: From :func:`find_units`.
        topology: Where every rank is.
        micro_steps: Per optimizer step.
        hierarchical: Whether collectives of the partition group run in two stages.
        once_per_step: What travels once per step.
        two_hop: Whether the second hop waits for the boundary.
        gathered_dtype: Of gathered parameters.
        reduce_dtype: Of gradient sums.
        cross_node_dtype: What gradients travel in between nodes; None is ``reduce_dtype``.
    """
    step = _Step(topology, micro_steps, hierarchical, once_per_step, two_hop, cross_node_dtype)
    return [
        repeated
        for unit in units
        for repeated in (*step.gathers(unit, gathered_dtype), *step.reductions(unit, reduce_dtype))
        if repeated.collective.ranks > 1
    ]


def total_sent(traffic: Iterable[Repeated]) -> Sent:
    """What rank 0 sends in all of ``traffic``."""
    total = Sent()
    for repeated in traffic:
        sent = repeated.collective.sent
        total += Sent(sent.inside_bytes * repeated.times, sent.between_bytes * repeated.times)
    return total


@dataclass(frozen=True)
class _Step:
    topology: Topology
    micro_steps: int
    hierarchical: bool
    once_per_step: OncePerStepOptions
    two_hop: bool
    cross_node_dtype: torch.dtype | None

    @property
    def _in_stages(self) -> bool:
        return self.hierarchical or (self.topology.spans_nodes and self.topology.local_ranks_per_partition_group == 1)

    def gathers(self, unit: Unit, dtype: torch.dtype) -> list[Repeated]:
        elements = unit.elements(self.topology.partition_size)
        uses = self.micro_steps * (1 if unit.is_root else 2)
        if self.once_per_step["in_node_gather"] == "once_per_step":
            uses = 1
        if not self._in_stages:
            return [self._run("all_gather", "partition", elements, dtype, uses)]
        k = self.topology.local_ranks_per_partition_group
        crossings = 1 if self.once_per_step["cross_node_gather"] == "once_per_step" else uses
        rail = self._run("all_gather", "rail", elements // k, dtype, crossings)
        return [rail, self._run("all_gather", "node", elements, dtype, uses)]

    def reductions(self, unit: Unit, dtype: torch.dtype) -> list[Repeated]:
        p, k = self.topology.partition_size, self.topology.local_ranks_per_partition_group
        elements = unit.elements(p)
        in_node = 1 if self.once_per_step["in_node_reduce"] == "once_per_step" else self.micro_steps
        crossings = 1 if self.once_per_step["cross_node_reduce"] == "once_per_step" else in_node
        if self._in_stages:
            wire = self.cross_node_dtype
            rail: Kind = "reduce_scatter" if wire is None else "all_to_all"
            first = [
                self._run("reduce_scatter", "node", elements, dtype, in_node),
                self._run(rail, "rail", elements // k, wire or dtype, crossings),
            ]
        else:
            first = [self._run("reduce_scatter", "partition", elements, dtype, in_node)]
        return [*first, *self._second_hop(elements // p, dtype, 1 if self.two_hop else self.micro_steps)]

    def _second_hop(self, shard: int, dtype: torch.dtype, times: int) -> list[Repeated]:
        wire, replicas = self.cross_node_dtype, self.topology.replicas
        if wire is None:
            return [self._run("all_reduce", "replication", shard, dtype, times)]
        whole = -(-shard // replicas) * replicas
        return [self._run(kind, "replication", whole, wire, times) for kind in ("all_to_all", "all_gather")]

    def _run(self, kind: Kind, group: str, elements: int, dtype: torch.dtype, times: int) -> Repeated:
        ranks = self._members(group)
        nodes = [self.topology.node_of(rank) for rank in ranks]
        name = "partition" if ranks == self._members("partition") else group
        sent = sent_by(kind, elements * dtype.itemsize, nodes=nodes, position=0)
        collective = Collective(
            kind=kind, group=name, ranks=len(ranks), nodes=len(set(nodes)), dtype=dtype, elements=elements, sent=sent
        )
        return Repeated(collective, times)

    def _members(self, group: str) -> tuple[int, ...]:
        if group == "replication":
            return self.topology.replication_group(0)
        if group == "rail":
            return self.topology.rail(0)
        if group == "node":
            return self.topology.node_group(0)
        ranks = self.topology.partition_group(0)
        return ranks if self.hierarchical else tuple(sorted(ranks))
