"""How gradients, momentum and updates of matrices move between shards, holders and owners.

See :mod:`~lightning_mics.techniques.matrix_owners`. All are exchanges of rows, of another number with each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics._torch.process_groups import premultiplied_sum_factor
from lightning_mics.collectives.counted_group import CountedGroup, ReduceOp
from lightning_mics.techniques.matrix_owners import OwnedMatrix, RowsOfRanks

GRADIENTS, INSIDE = "gradients to owners", "updates in nodes of owners"
UPDATES, ROWS = "updates from owners", "rows of owned matrices"


class OwnerExchange:
    """Moves rows of matrices between shards, holders and owners; every rank calls the same methods in the same order.

    All matrices of a call have one dtype.

    Args:
        rows: Which rows ranks hold.
        rank: This rank.
        across: Ranks with this local rank, one per node, in the order of nodes; None if there is one node.
        beside: Ranks of this node with the same shard, in their order; None if there is one.
        inside: Ranks of this node and partition group, in their order; None if there is one.
    """

    def __init__(
        self,
        rows: RowsOfRanks,
        *,
        rank: int,
        across: CountedGroup | None,
        beside: CountedGroup | None,
        inside: CountedGroup | None,
    ) -> None:
        self.rows = rows
        self._rank = rank
        self._across, self._beside, self._inside = across, beside, inside
        self._node, self._slice = rows.node(rank), rows.slice_of(rank)
        self._replica = rows.replica_in_node(rank)

    def holds(self, matrix: OwnedMatrix) -> bool:
        """Whether this rank holds a slice of a matrix for its owner."""
        return self.rows.holds(self._rank, matrix)

    def owns(self, matrix: OwnedMatrix) -> bool:
        """Whether this rank is the owner of a matrix."""
        return matrix.owner == self._rank

    def held_rows(self, matrix: OwnedMatrix) -> range:
        """Rows that this rank holds of a matrix for its owner; none on other ranks."""
        return self.rows.rows_of_slice(self._slice, matrix) if self.holds(matrix) else range(0)

    def slice_rows(self, matrix: OwnedMatrix) -> range:
        """Rows of this rank's slice of a matrix."""
        return self.rows.rows_of_slice(self._slice, matrix)

    def own_rows(self, matrix: OwnedMatrix) -> range:
        """Rows of a matrix in the shard of this rank."""
        return self.rows.own_rows(self._rank, matrix)

    def reduce(
        self, matrices: Sequence[OwnedMatrix], sums: Sequence[Tensor], *, wire_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Sum slices over the job, to their holders.

        Args:
            matrices: The matrices.
            sums: The slice of each on this rank, summed over its partition group on this node: [slice, columns].
            wire_dtype: Dtype of messages between nodes; None is that of the sums.

        Returns:
            Of each matrix the rows that this rank holds: [held, columns].
        """
        here = [matrix for matrix in matrices if self.rows.replica_in_node(matrix.owner) == self._replica]
        ordered = [(self.rows.replica_in_node(m.owner), self.rows.node(m.owner)) for m in matrices]
        by_replica = [
            [total for total, (replica, _) in zip(sums, ordered, strict=True) if replica == of]
            for of in range(self.rows.replicas_in_node)
        ]
        shapes = [matrix.of_rows(self.slice_rows(matrix)) for matrix in here]
        in_node = self._summed(self._beside, by_replica, self._replica, shapes, like=sums[0])
        nodes = [self.rows.node(matrix.owner) for matrix in here]
        by_node = [
            [total for total, node in zip(in_node, nodes, strict=True) if node == of]
            for of in range(self.rows.topology.nodes)
        ]
        shapes = [matrix.of_rows(self.slice_rows(matrix)) for matrix in here if self.holds(matrix)]
        held = iter(self._summed(self._across, by_node, self._node, shapes, like=sums[0], wire_dtype=wire_dtype))
        return [next(held) if self.holds(m) else _empty(m, sums[0]) for m in matrices]

    def to_holders(self, matrices: Sequence[OwnedMatrix], shards: Sequence[Tensor]) -> list[Tensor]:
        """Move rows, which all replicas have, from shards to holders.

        Args:
            matrices: The matrices.
            shards: The rows of each in this rank's shard: [own, columns].

        Returns:
            Of each matrix the rows that this rank holds: [held, columns].
        """
        if self.rows.positions_per_slice == 1:
            return [shard if self.holds(m) else _empty(m, shard) for m, shard in zip(matrices, shards, strict=True)]
        outgoing: list[list[Tensor]] = [[] for _ in range(self.rows.topology.nodes)]
        for matrix, shard in zip(matrices, shards, strict=True):
            node = self.rows.node(matrix.owner)
            if self.rows.shares_replica(self._rank, node):
                outgoing[node].append(shard)
        held = [matrix for matrix in matrices if self.holds(matrix)]
        incoming = [
            [m.of_rows(self.rows.rows_on(node, self._slice, m)) for m in held]
            if self.rows.shares_replica(self._rank, node)
            else []
            for node in range(self.rows.topology.nodes)
        ]
        received = _exchanged(self._across, self._node, outgoing, incoming, like=shards[0], technique=ROWS)
        parts = iter(zip(*(of_node for of_node in received if of_node), strict=True))
        return [torch.cat(next(parts)) if self.holds(m) else _empty(m, shards[0]) for m in matrices]

    def to_owners(self, matrices: Sequence[OwnedMatrix], held: Sequence[Tensor]) -> list[Tensor | None]:
        """Gather matrices on their owners.

        Args:
            matrices: The matrices.
            held: The rows of each that this rank holds: [held, columns].

        Returns:
            Those that this rank owns: [rows, columns] each; None for the others.
        """
        outgoing: list[list[Tensor]] = [[] for _ in range(self.rows.slices)]
        for matrix, part in zip(matrices, held, strict=True):
            if self.holds(matrix):
                outgoing[self.rows.slice_of(matrix.owner)].append(part)
        owned = [matrix for matrix in matrices if self.owns(matrix)]
        incoming = [
            [m.of_rows(self.rows.rows_of_slice(of_slice, m)) for m in owned] for of_slice in range(self.rows.slices)
        ]
        received = _exchanged(self._inside, self._slice, outgoing, incoming, like=held[0], technique=INSIDE)
        whole = iter([torch.cat(parts) for parts in zip(*received, strict=True)])
        return [next(whole) if self.owns(matrix) else None for matrix in matrices]

    def from_owners(
        self, matrices: Sequence[OwnedMatrix], whole: Sequence[Tensor | None], *, like: Tensor
    ) -> list[Tensor]:
        """Return updates from owners to holders.

        Args:
            matrices: The matrices.
            whole: The updates of those that this rank owns: [rows, columns] each; None for the others.
            like: A tensor with the dtype and on the device of updates: [any].

        Returns:
            Of each matrix the rows that this rank holds: [held, columns].
        """
        outgoing = [
            [
                update[_as_slice(self.rows.rows_of_slice(of_slice, matrix))]
                for matrix, update in zip(matrices, whole, strict=True)
                if update is not None
            ]
            for of_slice in range(self.rows.slices)
        ]
        held = [matrix for matrix in matrices if self.holds(matrix)]
        incoming: list[list[tuple[int, int]]] = [[] for _ in range(self.rows.slices)]
        for matrix in held:
            incoming[self.rows.slice_of(matrix.owner)].append(matrix.of_rows(self.held_rows(matrix)))
        received = _exchanged(self._inside, self._slice, outgoing, incoming, like=like, technique=INSIDE)
        parts = [iter(of_slice) for of_slice in received]
        return [
            next(parts[self.rows.slice_of(m.owner)]) if self.holds(m) else like.new_empty(0, m.columns)
            for m in matrices
        ]

    def spread(
        self, matrices: Sequence[OwnedMatrix], held: Sequence[Tensor], *, slices: bool, technique: str = UPDATES
    ) -> list[Tensor]:
        """Send rows from holders to all nodes.

        Args:
            matrices: The matrices.
            held: The rows of each that this rank holds: [held, columns].
            slices: Whether each rank gets all rows of its slice; otherwise those of its shard.
            technique: Name that traffic is counted under.

        Returns:
            Rows of each matrix: [slice or own, columns].
        """
        nodes = range(self.rows.topology.nodes)
        wanted = self.slice_rows if slices else self.own_rows
        outgoing: list[list[Tensor]] = [[] for _ in nodes]
        for matrix, part in zip(matrices, held, strict=True):
            if self.holds(matrix):
                begin = self.slice_rows(matrix).start
                for node in nodes:
                    rows = self.slice_rows(matrix) if slices else self.rows.rows_on(node, self._slice, matrix)
                    outgoing[node].append(part[rows.start - begin : rows.stop - begin])
        here = [matrix for matrix in matrices if self.rows.replica_in_node(matrix.owner) == self._replica]
        incoming = [[m.of_rows(wanted(m)) for m in here if self.rows.node(m.owner) == node] for node in nodes]
        received = _exchanged(self._across, self._node, outgoing, incoming, like=held[0], technique=technique)
        of_nodes = [iter(of_node) for of_node in received]
        mine = [next(of_nodes[self.rows.node(matrix.owner)]) for matrix in here]
        replicas = range(self.rows.replicas_in_node)
        incoming = [
            [m.of_rows(wanted(m)) for m in matrices if self.rows.replica_in_node(m.owner) == replica]
            for replica in replicas
        ]
        received = _exchanged(
            self._beside, self._replica, [mine for _ in replicas], incoming, like=held[0], technique=technique
        )
        of_replicas = [iter(of_replica) for of_replica in received]
        return [next(of_replicas[self.rows.replica_in_node(matrix.owner)]) for matrix in matrices]

    def _summed(
        self,
        group: CountedGroup | None,
        outgoing: Sequence[Sequence[Tensor]],
        own: int,
        shapes: Sequence[tuple[int, int]],
        *,
        like: Tensor,
        wire_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Send each rank of a group what it sums, and sum what arrives, in the order of ranks."""
        if group is None:
            return list(outgoing[own])
        sent_as = like.new_empty(0, dtype=wire_dtype or like.dtype)
        cast = [[part.to(sent_as.dtype) for part in to_rank] for to_rank in outgoing]
        received = _flat_exchange(group, cast, [shapes] * group.size, like=sent_as, technique=GRADIENTS)
        return _shaped(torch.stack(received).sum(0, dtype=like.dtype), shapes)


class OwnedReduction:
    """The reduction of one parameter group's owned matrices at the boundary, and of what else is in the group.

    Args:
        exchange: Exchange of the ranks.
        reduced: Returns where the parameters of the reduction that runs are, in [shard]: by position in the parameter
            group; and which of them may be reduced to an owner.
        take: Called as ``take(matrix, held)`` with the mean of each matrix, [held, columns].
        wire_dtype: Dtype of messages between nodes; None is that of the gradients.

    Attributes:
        matrices: The owned matrices, by position in the parameter group.
    """

    def __init__(
        self,
        exchange: OwnerExchange,
        *,
        reduced: Callable[[], Iterable[tuple[int, int, int, bool]]],
        take: Callable[[OwnedMatrix, Tensor], None],
        wire_dtype: torch.dtype | None,
    ) -> None:
        self._exchange = exchange
        self._reduced = reduced
        self._take = take
        self._wire_dtype = wire_dtype
        self.matrices: dict[int, OwnedMatrix] = {}

    @property
    def nodes(self) -> int:
        """Number of nodes in the job."""
        return self._exchange.rows.topology.nodes

    def __call__(
        self, slices: Tensor, output: Tensor, reduce_rest: Callable[[Tensor, Tensor], object], *, factor: float
    ) -> None:
        """Reduce owned matrices to their holders, and what else there is to its shard.

        Args:
            slices: Sums on this node of this rank's slice: [positions, shard].
            output: Result of this rank, [shard], may be ``slices``; zeros where matrices are owned.
            reduce_rest: Called as ``reduce_rest(result, source)`` for what is not owned: [positions * rest] -> [rest].
            factor: Factor of the sums of owned matrices.
        """
        owned, rest = self._parts()
        if not owned:
            reduce_rest(output, slices.view(-1))
            return
        sums = [
            slices[:, begin:end].reshape(-1, matrix.columns)[: len(self._exchange.slice_rows(matrix))]
            for matrix, begin, end in owned
        ]
        matrices = [matrix for matrix, _, _ in owned]
        for matrix, held in zip(
            matrices, self._exchange.reduce(matrices, sums, wire_dtype=self._wire_dtype), strict=True
        ):
            self._take(matrix, held * factor)
        source = _columns(slices, rest)
        result = source.new_empty(source.size(1))
        if rest:
            reduce_rest(result, source.view(-1))
        output.zero_()
        _put(output, rest, result)

    def reduce_rest(self, shard: Tensor, reduce: Callable[[Tensor], None]) -> None:
        """Reduce what is not owned, in place.

        Args:
            shard: Gradients of the parameter group: [shard].
            reduce: Called as ``reduce(rest)`` to reduce it in place, [rest], if there is any.
        """
        owned, rest = self._parts()
        if not owned:
            reduce(shard)
        elif rest:
            values = _columns(shard.view(1, -1), rest).view(-1)
            reduce(values)
            _put(shard, rest, values)

    def _parts(self) -> tuple[list[tuple[OwnedMatrix, int, int]], list[tuple[int, int]]]:
        """The owned matrices of the reduction that runs and where they are, and where the rest is, in [shard]."""
        owned: list[tuple[OwnedMatrix, int, int]] = []
        rest: list[tuple[int, int]] = []
        for index, begin, end, allowed in self._reduced():
            if allowed and index in self.matrices:
                owned.append((self.matrices[index], begin, end))
            else:
                rest.append((begin, end))
        return owned, rest


def _columns(rows: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """Some columns of ``rows`` [rows, shard], side by side: [rows, columns]."""
    return torch.cat([rows[:, :0], *(rows[:, begin:end] for begin, end in segments)], dim=1)


def _put(flat: Tensor, segments: Sequence[tuple[int, int]], values: Tensor) -> None:
    """Write ``values`` [columns], side by side, to their segments of ``flat`` [shard]."""
    sizes = [end - begin for begin, end in segments]
    for (begin, end), part in zip(segments, torch.split(values, sizes), strict=True):
        flat[begin:end] = part


def factor_of_mean(op: ReduceOp, *, ranks: int, scaled: bool) -> float:
    """The factor of a sum over nodes that makes it what ``op`` makes of it.

    Args:
        op: Sum, average or pre-multiplied sum.
        ranks: Number of values in the sum.
        scaled: Whether an earlier stage has applied the factor of a pre-multiplied sum.
    """
    if op == dist.ReduceOp.AVG:
        return 1 / ranks
    factor = premultiplied_sum_factor(op)
    return 1.0 if factor is None or scaled else factor


def _exchanged(
    group: CountedGroup | None,
    own: int,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[tuple[int, int]]],
    *,
    like: Tensor,
    technique: str,
) -> list[list[Tensor]]:
    """Send each rank of a group some matrices; returns those that each has sent, of the shapes ``incoming``."""
    if group is None:
        return [list(outgoing[own])]
    received = _flat_exchange(group, outgoing, incoming, like=like, technique=technique)
    return [_shaped(flat, shapes) for flat, shapes in zip(received, incoming, strict=True)]


def _flat_exchange(
    group: CountedGroup,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[tuple[int, int]]],
    *,
    like: Tensor,
    technique: str,
) -> tuple[Tensor, ...]:
    parts = [torch.cat([like.new_empty(0), *(part.reshape(-1) for part in to_rank)]) for to_rank in outgoing]
    sizes = [sum(rows * columns for rows, columns in shapes) for shapes in incoming]
    return group.exchange(parts, sizes, technique=technique)


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = torch.split(flat, [rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _empty(matrix: OwnedMatrix, like: Tensor) -> Tensor:
    return like.new_empty(0, matrix.columns)


def _as_slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
