"""The places of ranks: nodes, partition groups, replication groups and rails, as plain integers.

The paper (MiCS, section 3.1) cuts the ranks of a cluster into *partition groups* of ``partition_size`` consecutive
ranks; each holds one replica of the model states. Two partition groups of four ranks over nodes of two ranks::

    partition group 0:   node 0 = ranks 0 1   node 1 = ranks 2 3
    partition group 1:   node 2 = ranks 4 5   node 3 = ranks 6 7

    partition group   (0, 2, 1, 3)             one replica, listed rail by rail
    rail              (0, 2), (1, 3), ...      same local rank, one per node, inside a partition group
    replication group (0, 4), (1, 5), ...      the ranks that hold the same part

A partition group is listed *rail by rail*: positions are ordered by ``(local rank, node)``, so the shards that a rail
gathers are one contiguous slice of the unsharded tensor. ``hierarchical`` builds on that order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The ranks of a job, cut into partition groups.

    Args:
        world_size: Number of ranks in the job.
        ranks_per_node: Number of ranks on each node; every node has the same number.
        partition_size: Number of ranks in each partition group: a divisor of ``ranks_per_node``, or a multiple of it.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If the sizes do not fit each other; the message names the sizes that would.
    """

    world_size: int
    ranks_per_node: int
    partition_size: int

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node", "partition_size"):
            _check_positive(name, getattr(self, name))
        _check_equal_nodes(self.world_size, self.ranks_per_node)
        sizes = partition_sizes(world_size=self.world_size, ranks_per_node=self.ranks_per_node)
        if self.partition_size not in sizes:
            raise ValueError(_refusal(self, sizes))

    @property
    def nodes(self) -> int:
        """Number of nodes in the job."""
        return self.world_size // self.ranks_per_node

    @property
    def replicas(self) -> int:
        """Number of partition groups in the job, and of ranks in each replication group."""
        return self.world_size // self.partition_size

    @property
    def nodes_per_partition_group(self) -> int:
        """Number of nodes that one partition group spans, and of ranks in each rail."""
        return max(1, self.partition_size // self.ranks_per_node)

    @property
    def local_ranks_per_partition_group(self) -> int:
        """Number of ranks of one partition group on each of its nodes."""
        return self.partition_size // self.nodes_per_partition_group

    @property
    def spans_nodes(self) -> bool:
        """Whether a partition group is spread over several nodes."""
        return self.nodes_per_partition_group > 1

    def node_of(self, rank: int) -> int:
        """The node that hosts ``rank``."""
        return self._checked(rank) // self.ranks_per_node

    def partition_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold one replica together with ``rank``, rail by rail."""
        return tuple(member for rail in self._rails(rank) for member in rail)

    def replication_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part of the model states as ``rank``, one per replica."""
        return tuple(range(self._checked(rank) % self.partition_size, self.world_size, self.partition_size))

    def rail(self, rank: int) -> tuple[int, ...]:
        """The ranks of this partition group with the same local rank as ``rank``, one per node."""
        return next(rail for rail in self._rails(rank) if rank in rail)

    def node_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of this partition group on the same node as ``rank``."""
        node = self.node_of(rank)
        return tuple(sorted(member for member in self.partition_group(rank) if self.node_of(member) == node))

    def _rails(self, rank: int) -> list[tuple[int, ...]]:
        first = self._checked(rank) // self.partition_size * self.partition_size
        step = self.local_ranks_per_partition_group
        return [tuple(range(first + local, first + self.partition_size, step)) for local in range(step)]

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank} is not one of the {self.world_size} ranks 0 to {self.world_size - 1}")
        return rank


def partition_sizes(*, world_size: int, ranks_per_node: int) -> list[int]:
    """List all valid partition sizes, smallest first.

    A partition group is either inside one node and divides it evenly, or a number of full nodes that divides the job.

    Args:
        world_size: Number of ranks in the job.
        ranks_per_node: Number of ranks on each node.
    """
    return [
        size
        for size in range(1, world_size + 1)
        if world_size % size == 0 and (ranks_per_node % size == 0 or size % ranks_per_node == 0)
    ]


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _check_equal_nodes(world_size: int, ranks_per_node: int) -> None:
    if world_size % ranks_per_node:
        divisors = [k for k in range(1, world_size + 1) if world_size % k == 0]
        raise ValueError(
            f"ranks_per_node={ranks_per_node} does not divide world_size={world_size}: every node needs the same "
            f"number of ranks; with {world_size} ranks use one of {_listed(divisors)}"
        )


def _refusal(topology: Topology, sizes: list[int]) -> str:
    p, world, k = topology.partition_size, topology.world_size, topology.ranks_per_node
    problem = f"does not divide world_size={world}" if world % p else f"cuts through nodes of {k} ranks"
    return f"partition_size={p} {problem}; with {k} ranks per node use one of {_listed(sizes)}"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
