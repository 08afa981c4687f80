"""Beyond the paper: optimizers that need whole matrices, such as Muon, at fewer bytes than AdamW.

Muon orthogonalizes the update of each matrix, which takes all rows of it. Each matrix has an *owner*, one rank of the
job, that does so once for all. Two nodes of two ranks, partition_size = 4, a matrix with rows A B C D, owned by rank 3;
the rank of each rail slice is its *holder* on the owner's node::

    boundary    reduce inside nodes          ranks 0, 2  [ A B ]    ranks 1, 3  [ C D ]    sums of each node
                reduce to the owner's node   rank 2      [ A B ]    rank 3      [ C D ]    sums of the job, momentum
    step        gather to the owner                                 rank 3  [ A B C D ]    orthogonalized there
                return inside the node       rank 2      [ a b ]    rank 3      [ c d ]    rows of the update
                send along rails             ranks 0, 2  [ a b ]    ranks 1, 3  [ c d ]    added on all nodes

Over N nodes, a reduction to one node sends M(N-1)/N bytes per node of matrices with M bytes, as a reduce-scatter does,
and so does sending updates to all nodes. Muon iterates in bfloat16, so its update *is* in bfloat16 and loses nothing on
the way, which halves the second part: together 3/4 of the bytes of AdamW's all-reduce, or of its gather and
reduce-scatter. Where parameters are cached on nodes, the update is added to the cached rows on every node: what sends
updates replaces the gather of the next step.

Ranks are owners by the floating-point operations of their matrices, so that all of them work at the same time. Momentum
stays with the holders, and takes M/n bytes on each of n ranks.

Where a partition group is smaller than a node, gradients are summed over the replicas of the node first, and updates
are sent to them last::

    beside    ranks of one node that hold the same shard
    across    ranks with the same local rank, one per node
    inside    ranks of one node and one partition group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mics.topology import Topology


@dataclass(frozen=True)
class OwnedMatrix:
    """A matrix that one rank owns.

    Attributes:
        rows: Number of rows.
        columns: Number of columns.
        owner: The rank that updates it.
        unit: Fully qualified name of the FSDP module that has it.
        index: Position among the parameters of that module.
    """

    rows: int
    columns: int
    owner: int
    unit: str = ""
    index: int = 0

    def of_rows(self, rows: range) -> tuple[int, int]:
        """Shape of some of its rows."""
        return len(rows), self.columns


class RowsOfRanks:
    """Which rows of matrices ranks hold: arithmetic alone.

    A partition group shards rows over its positions, rail by rail. The positions of one rail make a slice.

    Args:
        topology: Positions of all ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.slices = topology.local_ranks_per_partition_group
        self.positions_per_slice = topology.nodes_per_partition_group
        self.replicas_in_node = topology.ranks_per_node // self.slices

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.topology.ranks_per_node

    def slice_of(self, rank: int) -> int:
        """The slice that a rank has a part of."""
        return rank % self.topology.ranks_per_node % self.slices

    def replica_in_node(self, rank: int) -> int:
        """Which of the partition groups on its node a rank belongs to; 0 where that is one."""
        return rank % self.topology.ranks_per_node // self.slices

    def holds(self, rank: int, matrix: OwnedMatrix) -> bool:
        """Whether a rank holds a slice of a matrix for its owner.

        Args:
            rank: The rank.
            matrix: The matrix.
        """
        here, owner = self._place(rank), self._place(matrix.owner)
        return here == owner

    def shares_replica(self, rank: int, node: int) -> bool:
        """Whether a node has ranks of the partition group of ``rank``.

        Args:
            rank: The rank.
            node: The node.
        """
        return self.node(rank) // self.positions_per_slice == node // self.positions_per_slice

    def own_rows(self, rank: int, matrix: OwnedMatrix) -> range:
        """Rows of a matrix that are in the shard of a rank.

        Args:
            rank: The rank.
            matrix: The matrix.
        """
        return self.rows_on(self.node(rank), self.slice_of(rank), matrix)

    def rows_on(self, node: int, of_slice: int, matrix: OwnedMatrix) -> range:
        """Rows of a slice that are in a shard on a node.

        Args:
            node: The node.
            of_slice: The slice.
            matrix: The matrix.
        """
        chunk, position = self._chunk(matrix), of_slice * self.positions_per_slice + node % self.positions_per_slice
        return _clipped(position * chunk, chunk, matrix.rows)

    def rows_of_slice(self, of_slice: int, matrix: OwnedMatrix) -> range:
        """Rows of a slice.

        Args:
            of_slice: The slice.
            matrix: The matrix.
        """
        chunk = self._chunk(matrix) * self.positions_per_slice
        return _clipped(of_slice * chunk, chunk, matrix.rows)

    def _chunk(self, matrix: OwnedMatrix) -> int:
        return -(-matrix.rows // self.topology.partition_size)

    def _place(self, rank: int) -> tuple[int, int]:
        return self.node(rank), self.replica_in_node(rank)


def _clipped(begin: int, length: int, end: int) -> range:
    return range(min(begin, end), min(begin + length, end))


def choose_owners(
    costs: Sequence[tuple[float, int]], topology: Topology, loads: list[float], node_bytes: list[int]
) -> list[int]:
    """The owner of each matrix: the largest first, each to the rank with the least to do.

    Of ranks that have as little to do the one is taken whose node owns the fewest bytes.

    Args:
        costs: Floating-point operations and bytes of each matrix.
        topology: Positions of all ranks.
        loads: Operations of each rank so far: [ranks]; those of the matrices are added.
        node_bytes: Bytes that each node owns so far: [nodes]; those of the matrices are added.
    """
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index][0]):
        flops, size_bytes = costs[index]
        owner = min(range(len(loads)), key=lambda rank: (loads[rank], node_bytes[topology.node_of(rank)], rank))
        owners[index] = owner
        loads[owner] += flops
        node_bytes[topology.node_of(owner)] += size_bytes
    return owners
