"""The bytes that collectives send inside nodes and between nodes, by technique.

The counts follow from the sizes of buffers and the algorithms of backends: a ring for all-gather, reduce-scatter,
all-reduce and broadcast, pairs for all-to-all. In a ring over several nodes a few ranks send to other nodes for all; a
rank counts the average of the ranks on its node, so a node sends ``ranks_per_node`` times what one of them counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]

ALIGNED_FROM = 1024  # elements, from which on alignment adds less than 1 % to a message


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank has sent.

    Attributes:
        inside_bytes: Bytes to ranks on its own node.
        between_bytes: Bytes to ranks on other nodes.
    """

    inside_bytes: float = 0.0
    between_bytes: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.inside_bytes + other.inside_bytes, self.between_bytes + other.between_bytes)

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.inside_bytes - other.inside_bytes, self.between_bytes - other.between_bytes)


def part_of(elements: int, ranks: int) -> int:
    """Elements that each of ``ranks`` sums of a tensor, where it is reduced by pairs.

    Large parts begin at multiples of 8 elements: NCCL copies 16 bytes at a time only where memory is aligned to them.

    Args:
        elements: Number of elements of the tensor.
        ranks: Number of ranks.
    """
    part = -(-elements // ranks)
    return part if part < ALIGNED_FROM else part + -part % 8


class SentShares:
    """The shares of its messages that one rank sends to other nodes, for counting many collectives of one group.

    Args:
        nodes: Node of each rank, in the order of the group: [ranks].
        position: Position of the rank in the group.

    Attributes:
        of_ring: Share, 0 to 1, in a ring, averaged over the ranks.
        of_pairs: Share, 0 to 1, of the other ranks that are on other nodes.
    """

    def __init__(self, nodes: Sequence[int], *, position: int) -> None:
        self._ranks = n = len(nodes)
        self.of_ring = sum(nodes[i] != nodes[(i + 1) % n] for i in range(n)) / n
        self.of_pairs = sum(node != nodes[position] for node in nodes) / max(1, n - 1)

    def sent(self, kind: Kind, total_bytes: float, *, gloo: bool = False) -> Sent:
        """Bytes that the rank sends in a collective.

        Args:
            kind: Kind of the collective.
            total_bytes: Bytes that are gathered, reduced or exchanged, over all ranks, or broadcast.
            gloo: Whether the backend is gloo, whose reduce-scatter is an all-reduce.
        """
        twice = kind == "all_reduce" or (kind == "reduce_scatter" and gloo)
        sent_bytes = (2 if twice else 1) * total_bytes * (self._ranks - 1) / self._ranks
        between = self.of_pairs if kind == "all_to_all" else self.of_ring
        return Sent(sent_bytes * (1 - between), sent_bytes * between)


def sent_in_parts(sizes_bytes: Sequence[int], *, nodes: Sequence[int], position: int) -> Sent:
    """Bytes that one rank sends in an exchange of parts of different sizes.

    Args:
        sizes_bytes: Bytes of the part for each rank, in the order of the group: [ranks].
        nodes: Node of each rank, in the order of the group: [ranks].
        position: Position of the rank in the group.
    """
    between = sum(size for size, node in zip(sizes_bytes, nodes, strict=True) if node != nodes[position])
    return Sent(float(sum(sizes_bytes) - sizes_bytes[position] - between), float(between))


def sent_by(
    kind: Kind,
    total_bytes: float,
    *,
    nodes: Sequence[int],
    position: int,
    gloo: bool = False,
    sizes_bytes: Sequence[int] = (),
) -> Sent:
    """Bytes that one rank sends in one collective; see :meth:`SentShares.sent`.

    Args:
        kind: Kind of the collective.
        total_bytes: Bytes that are gathered, reduced or exchanged, over all ranks, or broadcast.
        nodes: Node of each rank, in the order of the group: [ranks].
        position: Position of the rank in the group.
        gloo: Whether the backend is gloo, whose reduce-scatter is an all-reduce.
        sizes_bytes: Bytes of the part for each rank, in an exchange of parts of different sizes; else empty.
    """
    if sizes_bytes:
        return sent_in_parts(sizes_bytes, nodes=nodes, position=position)
    return SentShares(nodes, position=position).sent(kind, total_bytes, gloo=gloo)


class Traffic:
    """The bytes that this rank has sent in the collectives of sharded training, by technique."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}

    def record(self, technique: str, sent: Sent) -> None:
        """Add a collective.

        Args:
            technique: Name of the technique that the collective belongs to.
            sent: Bytes of this rank.
        """
        self._sent[technique] = self._sent.get(technique, Sent()) + sent

    def by_technique(self) -> dict[str, Sent]:
        """Bytes sent so far, for each technique that has sent any."""
        return dict(self._sent)
