"""The collectives of one process group, each counted as it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch.process_groups import (
    all_gather_single,
    premultiplied_sum_factor,
    reduce_scatter_single,
)
from lightning_mics._torch.profiling import named_range
from lightning_mics.collectives.traffic import Kind, SentShares, Traffic, part_of, sent_in_parts

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType


_HOPS = {"reduce": "hop 1: ", "all-reduce": "hop 2: "}  # by the first word of a technique


class CountedGroup:
    """A process group with the collectives that techniques are made of.

    Profilers show each collective as a range with the names of its technique and its parameter group, such as
    ``MiCS::hop 1: reduce inside nodes (blocks.3)``.

    Args:
        group: Process group of this rank.
        nodes: Node of each rank, in the order of the group: [ranks].
        traffic: Counter that every collective is recorded in.
        backend: Name of the backend that runs them: ``"gloo"`` or ``"nccl"``.
    """

    def __init__(self, group: dist.ProcessGroup, *, nodes: Sequence[int], traffic: Traffic, backend: str) -> None:
        self._group = group
        self._gloo = backend == "gloo"
        self._traffic = traffic
        self._nodes = tuple(nodes)
        self._sent_shares = SentShares(nodes, position=group.rank())
        self._unit: str | None = None

    def of_unit(self, name: str) -> CountedGroup:
        """The same group for the collectives of one parameter group, which profilers then name.

        Args:
            name: Fully qualified name of the parameter group's module; empty for the root.
        """
        named = copy.copy(self)
        named._unit = name or "root"
        return named

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._group.size()

    @property
    def rank(self) -> int:
        """Position of this rank in the group."""
        return self._group.rank()

    def all_gather(
        self,
        output: Tensor,  # [ranks * shard]
        shard: Tensor,  # [shard]; may be this rank's part of `output`
        *,
        technique: str,
        async_op: bool = False,
        run: Callable[..., dist.Work | None] | None = None,
    ) -> dist.Work | None:
        """Gather every rank's shard, in the order of the group.

        Args:
            output: Gathered shards: [ranks * shard].
            shard: Shard of this rank: [shard]; may be its part of ``output``.
            technique: Name that traffic is counted under.
            async_op: Whether to return at once with the work to wait for.
            run: Collective to call in place of the backend's own over this group.
        """
        self._count("all_gather", self.size * shard.nbytes, technique)
        run = run or partial(all_gather_single, group=self._group)
        with self._range(technique):
            return run(output, shard, async_op=async_op)

    def reduce_scatter(
        self,
        output: Tensor,  # [shard]; may be this rank's part of `source`
        source: Tensor,  # [ranks * shard]
        *,
        op: ReduceOp,
        technique: str,
        wire_dtype: torch.dtype | None = None,
        async_op: bool = False,
        run: Callable[..., dist.Work | None] | None = None,
    ) -> dist.Work | None:
        """Reduce over the ranks and leave each with its shard.

        Runs the backend's own collective. An all-to-all and a local sum take its place where messages have another
        dtype than the sum, and on gloo, whose reduce-scatter is an all-reduce inside and sends twice the bytes. (Over a
        group of several nodes with several ranks each that all-reduce enters a node once, the all-to-all once per rank:
        there gloo's own is used.)

        Args:
            output: Result of this rank: [shard]; may be its part of ``source``.
            source: Values of this rank: [ranks * shard].
            op: Sum, average or pre-multiplied sum.
            technique: Name that traffic is counted under.
            wire_dtype: Dtype of messages; None is that of ``source``.
            async_op: Whether to return at once with the work to wait for, where the backend's own collective runs.
            run: Collective to call in place of the backend's own over this group.

        Raises:
            ValueError: If ``op`` is one that a local sum cannot do: other than SUM, AVG and PREMUL_SUM.
        """
        if wire_dtype is not None or (self._gloo and self._sent_shares.of_pairs in (0, 1)):
            with self._range(technique):
                parts = self._exchange(source.to(wire_dtype or source.dtype), technique)
                _reduce_locally(parts, output, op=op)
            return None
        self._count("reduce_scatter", source.nbytes, technique, gloo=self._gloo)
        run = run or partial(reduce_scatter_single, group=self._group)
        with self._range(technique):
            if source.dtype == torch.bfloat16 and (factor := premultiplied_sum_factor(op)) is not None:
                # NCCL would be handed a factor of zero: https://github.com/pytorch/pytorch/issues/190745
                run(output, source, op=dist.ReduceOp.SUM)
                output.mul_(factor)
                return None
            return run(output, source, op=op, async_op=async_op)

    def all_reduce(
        self, tensor: Tensor, *, op: ReduceOp, technique: str, wire_dtype: torch.dtype | None = None
    ) -> None:
        """Reduce ``tensor`` in place over the ranks, with messages in ``wire_dtype`` and sums in its own dtype.

        All ranks end with the same bits: with another dtype of messages each part is summed by one rank, rounded, and
        sent to all.

        Args:
            tensor: Values of this rank, replaced by the result: [any].
            op: Sum, average or pre-multiplied sum.
            technique: Name that traffic is counted under.
            wire_dtype: Dtype of messages; None is that of ``tensor``.
        """
        if wire_dtype is None:
            with self._range(technique):
                dist.all_reduce(tensor, group=self._group, op=op)
            self._count("all_reduce", tensor.nbytes, technique)
            return
        shard_numel = part_of(tensor.numel(), self.size)
        source = tensor.new_zeros(self.size * shard_numel, dtype=wire_dtype)
        source[: tensor.numel()].copy_(tensor.view(-1))
        shard = tensor.new_empty(shard_numel)
        with self._range(technique):
            _reduce_locally(self._exchange(source, technique), shard, op=op)
        self.all_gather(source, shard.to(wire_dtype), technique=technique)
        tensor.view(-1).copy_(source[: tensor.numel()])

    def count_all_reduce(self, tensor: Tensor, *, technique: str) -> None:
        """Count an all-reduce over this group that FSDP2 has run; profilers show a mark behind it.

        Args:
            tensor: Reduced values: [any].
            technique: Name that traffic is counted under.
        """
        with self._range(technique):
            self._count("all_reduce", tensor.nbytes, technique)

    def count_direct_use(self, kind: Kind, total_bytes: int) -> None:
        """Count a collective over this group that serves the direct use of a sharded parameter.

        Args:
            kind: Kind of the collective.
            total_bytes: Bytes that are gathered or reduced, over all ranks.
        """
        self._count(kind, total_bytes, "parameters used directly", gloo=self._gloo)

    def _exchange(self, source: Tensor, technique: str) -> Tensor:
        """Send each rank its part of ``source`` [ranks * shard]; returns the parts for this rank [ranks, shard]."""
        self._count("all_to_all", source.nbytes, technique)
        parts = torch.empty_like(source)
        dist.all_to_all_single(parts, source, group=self._group)
        return parts.view(self.size, -1)

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], *, technique: str) -> tuple[Tensor, ...]:
        """Send each rank a part of a size of its own.

        Args:
            parts: What each rank gets of this one, in the order of the group, flat and all in one dtype: [any] each.
            sizes: Number of elements that this rank gets of each.
            technique: Name that traffic is counted under.

        Returns:
            What each rank has sent to this one, in the order of the group: [size] each.
        """
        sent = sent_in_parts([part.nbytes for part in parts], nodes=self._nodes, position=self.rank)
        self._traffic.record(technique, sent)
        source = torch.cat(list(parts))
        received = source.new_empty(sum(sizes))
        with self._range(technique):
            dist.all_to_all_single(received, source, list(sizes), [part.numel() for part in parts], group=self._group)
        return torch.split(received, list(sizes))

    def broadcast(self, tensor: Tensor, *, technique: str) -> None:
        """Give all ranks the values of the first rank of the group, in place.

        Args:
            tensor: Tensor of this rank, [any], of the same shape on all.
            technique: Name that traffic is counted under.
        """
        self._count("broadcast", tensor.nbytes, technique)
        with self._range(technique):
            dist.broadcast(tensor, group=self._group, group_src=0)

    def _range(self, technique: str) -> AbstractContextManager[object]:
        return named_range(lambda: f"MiCS::{_HOPS.get(technique.split()[0], '')}{technique} ({self._unit or 'all'})")

    def _count(self, kind: Kind, total_bytes: int, technique: str, *, gloo: bool = False) -> None:
        self._traffic.record(technique, self._sent_shares.sent(kind, total_bytes, gloo=gloo))


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
