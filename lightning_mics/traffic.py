"""Collectives over one group, and the count of what they send: bytes inside nodes and between nodes, by technique.

The counts follow from the sizes of buffers and the algorithms that backends use: a ring for all-gather, reduce-scatter
and all-reduce, pairs for all-to-all. In a ring over several nodes a few ranks send to other nodes for all; a rank
counts the average of the ranks on its node, so a node sends ``ranks_per_node`` times what one of its ranks counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch_compat import (
    all_gather_single,
    backend_name,
    premultiplied_sum_factor,
    reduce_scatter_single,
)

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank has sent to ranks on its own node and to ranks on other nodes."""

    inside_bytes: float = 0.0
    between_bytes: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside_bytes + other.inside_bytes, self.between_bytes + other.between_bytes)

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.inside_bytes - other.inside_bytes, self.between_bytes - other.between_bytes)


def sent_by(kind: Kind, whole_bytes: float, *, nodes: Sequence[int], position: int, gloo: bool = False) -> Sent:
    """What one rank sends in a collective.

    Args:
        kind: Of the collective.
        whole_bytes: What is gathered, reduced or exchanged, of all ranks together.
        nodes: The node of each rank, in the order of the group.
        position: Of the rank in the group.
        gloo: Whether gloo runs it, whose reduce-scatter is an all-reduce.
    """
    n = len(nodes)
    twice = kind == "all_reduce" or (kind == "reduce_scatter" and gloo)
    sent_bytes = (2 if twice else 1) * whole_bytes * (n - 1) / n
    if kind == "all_to_all":
        between_share = pair_share(nodes, position)
    else:
        between_share = sum(nodes[i] != nodes[(i + 1) % n] for i in range(n)) / n
    return Sent(sent_bytes * (1 - between_share), sent_bytes * between_share)


def pair_share(nodes: Sequence[int], position: int) -> float:
    """The share of the other ranks, 0 to 1, that are on other nodes than the rank at ``position``."""
    return sum(node != nodes[position] for node in nodes) / max(1, len(nodes) - 1)


class Traffic:
    """What the collectives of sharded training have sent since they were made."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}

    def record(self, technique: str, sent: Sent) -> None:
        """Add what was ``sent``."""
        self._sent[technique] = self._sent.get(technique, Sent()) + sent

    def by_technique(self) -> dict[str, Sent]:
        """What was sent so far, for each technique that has sent anything."""
        return dict(self._sent)


class CountedGroup:
    """A process group with the collectives that techniques are made of.

    Args:
        group: The ranks.
        nodes: The node of each of them, in the order of the group.
        traffic: Where to count.
    """

    def __init__(self, group: dist.ProcessGroup, *, nodes: Sequence[int], traffic: Traffic) -> None:
        self._group = group
        self._traffic = traffic
        self._nodes = nodes

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._group.size()

    @property
    def rank(self) -> int:
        """The position of this rank."""
        return self._group.rank()

    def all_gather(
        self,
        output: Tensor,  # [ranks * shard]
        shard: Tensor,  # [shard]; may be this rank's part of `output`
        *,
        technique: str,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every rank's shard, in the order of the group."""
        self._count("all_gather", self.size * shard.nbytes, technique)
        work: dist.Work | None = all_gather_single(output, shard, group=self._group, async_op=async_op)
        return work

    def reduce_scatter(
        self,
        output: Tensor,  # [shard]; may be this rank's part of `source`
        source: Tensor,  # [ranks * shard]
        *,
        op: ReduceOp,
        technique: str,
        wire_dtype: torch.dtype | None = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce over the ranks and leave each with its shard.

        By the backend's own collective; by an all-to-all and a local sum where the bytes travel in another dtype than
        they are summed in, and on gloo, whose reduce-scatter is an all-reduce inside and sends twice the bytes. (Over
        a group of several nodes with several ranks each that all-reduce enters a node once, the all-to-all once per
        rank: there gloo's own is used.)

        Raises:
            ValueError: If ``op`` is one that a local sum cannot do: other than SUM, AVG and PREMUL_SUM.
        """
        gloo = backend_name(self._group, source.device) == "gloo"
        if wire_dtype is not None or (gloo and pair_share(self._nodes, self.rank) in (0, 1)):
            parts = self._exchange(source.to(wire_dtype or source.dtype), technique)
            _reduce_locally(parts, output, op=op)
            return None
        self._count("reduce_scatter", source.nbytes, technique, gloo=gloo)
        work: dist.Work | None = reduce_scatter_single(output, source, group=self._group, op=op, async_op=async_op)
        return work

    def all_reduce(self, tensor: Tensor, *, op: ReduceOp, technique: str, wire_dtype: torch.dtype) -> None:
        """Reduce ``tensor`` [any] in place over the ranks, in ``wire_dtype`` on the wire and in its own dtype in sums.

        All ranks end with the same bits: each part is summed by one rank, rounded, and sent to all.
        """
        shard_numel = -(-tensor.numel() // self.size)
        source = tensor.new_zeros(self.size * shard_numel, dtype=wire_dtype)
        source[: tensor.numel()].copy_(tensor.view(-1))
        shard = tensor.new_empty(shard_numel)
        _reduce_locally(self._exchange(source, technique), shard, op=op)
        self.all_gather(source, shard.to(wire_dtype), technique=technique)
        tensor.view(-1).copy_(source[: tensor.numel()])

    def count_all_reduce(self, tensor: Tensor, *, technique: str) -> None:
        """Count an all-reduce of ``tensor`` over this group that somebody else has run."""
        self._count("all_reduce", tensor.nbytes, technique)

    def _exchange(self, source: Tensor, technique: str) -> Tensor:
        """Send each rank its part of ``source`` [ranks * shard]; returns the parts for this rank [ranks, shard]."""
        self._count("all_to_all", source.nbytes, technique)
        parts = torch.empty_like(source)
        dist.all_to_all_single(parts, source, group=self._group)
        return parts.view(self.size, -1)

    def _count(self, kind: Kind, whole_bytes: int, technique: str, *, gloo: bool = False) -> None:
        sent = sent_by(kind, whole_bytes, nodes=self._nodes, position=self.rank, gloo=gloo)
        self._traffic.record(technique, sent)


def _reduce_locally(parts: Tensor, output: Tensor, *, op: ReduceOp) -> None:
    """Reduce ``parts`` [ranks, shard] into ``output`` [shard], in the dtype of ``output``."""
    factor = premultiplied_sum_factor(op)
    if factor is None and op == dist.ReduceOp.AVG:
        factor = 1 / parts.size(0)
    elif factor is None and op != dist.ReduceOp.SUM:
        raise ValueError(f"a reduce-scatter by pairs takes SUM, AVG and PREMUL_SUM, got {op}")
    torch.sum(parts, dim=0, dtype=output.dtype, out=output)
    if factor is not None:
        output.mul_(factor)
