"""Which bytes each rank saves in memory, so that every byte is on two nodes.

::

    partition group 0   rank 0: its rows, those of rank 4     rank 1: its rows, those of rank 5     ...
    partition group 1   rank 4: its rows, those of rank 0     rank 5: its rows, those of rank 1     ...

Replicas divide each shard by rows, as they do to save it to a disk (:mod:`~lightning_mics.checkpoint.dcp.rows`). A rank
saves its own rows, and those of the rank that holds the same shard on another node: its memory has them already, so
nothing is sent. With one replica, rows are sent to the next node. What replicas do not have, the states of single ranks
and entries that are not sharded, is sent in both cases, to a node of another partition group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint.dcp.rows import divide
from lightning_mics.checkpoint.keys import rank_key
from lightning_mics.in_memory.keeper.memory import PartLayout
from lightning_mics.in_memory.table import StoredRows, encoded, end_of
from lightning_mics.topology import Topology

BLOB_BYTES = 2**16  # of entries that are not tensors, as long as they fit; then twice as much, and so on


@dataclass(frozen=True)
class Holders:
    """Who else has the bytes of a rank.

    Attributes:
        replica_offset: Distance, in replicas, of the replica of another node whose rows a rank saves as well; 0 if
            rows are sent, or nothing can be elsewhere.
        node_offset: Distance, in nodes, of the node that gets what is sent; 0 on a single node.
    """

    replica_offset: int
    node_offset: int

    @property
    def copies(self) -> int:
        """Number of nodes that have each byte."""
        return 2 if self.node_offset else 1

    @classmethod
    def of(cls, topology: Topology) -> Holders:
        """The holders in a job."""
        if topology.nodes == 1:
            return cls(0, 0)
        if topology.replicas == 1:
            return cls(0, 1)
        replicas_per_node = max(1, topology.ranks_per_node // topology.partition_size)
        return cls(replicas_per_node, topology.nodes_per_partition_group)


@dataclass
class Part:
    """A part of what a rank saves.

    Attributes:
        kind: ``"private"`` or ``"rows"``.
        rank: Rank that it belongs to.
        places: Places of its tensors.
        values: The tensors, each [any], in the order of places.
        blob: Pickled entries, at the end; only of rank 0's private part.
        blob_capacity: Bytes kept free for the blob.
    """

    kind: str
    rank: int
    places: list[StoredRows]
    values: list[Tensor]
    blob: bytes = b""
    blob_capacity: int = 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes before the blob."""
        return end_of(self.places)

    @property
    def used_bytes(self) -> int:
        """Bytes that are saved."""
        return self.tensor_bytes + len(self.blob)

    def layout(self) -> PartLayout:
        """The layout for the keeper."""
        return PartLayout(self.kind, self.rank, self.tensor_bytes + self.blob_capacity, encoded(self.places))


class Plan:
    """The parts of one rank, made once and used as long as the tensors are the same.

    Args:
        rank: This rank.
        topology: Positions of all ranks.
    """

    def __init__(self, *, rank: int, topology: Topology) -> None:
        self._rank = rank
        self._holders = Holders.of(topology)
        self._partner = (rank - self._holders.replica_offset * topology.partition_size) % topology.world_size
        self._known: list[tuple[Any, ...]] = []  # name, address and shape of each shard
        self.private = Part("private", rank, [], [])
        self.rows: list[Part] = []
        self.sharded: list[DTensor] = []

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order of a slot."""
        return [self.private, *self.rows]

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Kind and rank of all parts, known before there are tensors."""
        rows = [("rows", self._rank)]
        return [("private", self._rank), *rows, *([("rows", self._partner)] if self._holders.replica_offset else [])]

    @property
    def forwarded(self) -> list[tuple[str, int]]:
        """Kind and rank of parts that are sent besides the private one."""
        one_replica = self._holders.node_offset and not self._holders.replica_offset
        return [("rows", self._rank)] if one_replica else []

    def update(self, state: dict[str, Any], *, private: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
        """Plan to save a state; its unsharded entries are left to rank 0.

        Args:
            state: Nested dicts of tensors and other values, with the same names on all ranks.
            private: Tensors of this rank alone, each [any], by their names; they are saved under the key of the rank.

        Returns:
            Paths and values of entries of ``state`` that are not tensors, by their dotted names.
        """
        flat, paths = flatten_state_dict(state)
        sharded = {name: value for name, value in flat.items() if isinstance(value, DTensor)}
        known = [(name, t._local_tensor.data_ptr(), t._local_tensor.shape) for name, t in sharded.items()]
        if known != self._known:
            self._known = known
            self._divide(sharded, paths)
        others = {name: value for name, value in flat.items() if name not in sharded}
        first = self._rank == 0
        self.private = Part("private", self._rank, [], [], blob_capacity=self.private.blob_capacity)
        for name, value in others.items():
            if first and isinstance(value, Tensor):
                _add(self.private, name, paths[name], value.detach(), (0,) * value.ndim, value.size())
        key = rank_key(self._rank)
        for name, value in private.items():
            _add(self.private, f"{key}.{name}", (key, name), value, (0,) * value.ndim, value.size())
        return {name: (paths[name], value) for name, value in others.items() if not isinstance(value, Tensor)}

    def _divide(self, sharded: Mapping[str, DTensor], paths: Mapping[str, Any]) -> None:
        self.sharded = list(sharded.values())
        divided = divide(sharded)
        offsets = [0, self._holders.replica_offset] if self._holders.replica_offset else [0]
        self.rows = []
        for offset in offsets:
            part = Part("rows", self._partner if offset else self._rank, [], [])
            for name, shard in divided.items():
                replicas = 1 if shard.replication is None else shard.replication.size()
                wanted = (shard.replica - offset) % replicas
                for rows in shard.rows:
                    if rows.replica == wanted:
                        _add(part, name, paths[name], rows.values, rows.offsets, shard.unsharded_size)
            self.rows.append(part)

    def set_blob(self, blob: bytes) -> None:
        """Save pickled entries with the private part."""
        self.private.blob = blob
        self.private.blob_capacity = max(self.private.blob_capacity, blob_capacity(len(blob)))


def blob_capacity(size_bytes: int) -> int:
    """Bytes to keep free for a blob of this size, which may grow."""
    capacity = BLOB_BYTES if size_bytes else 0
    while capacity < size_bytes:
        capacity *= 2
    return capacity


def _add(part: Part, name: str, path: Any, values: Tensor, offsets: Any, unsharded_size: Any) -> None:
    if not values.numel() and prod(unsharded_size):
        return  # a rank without rows
    place = StoredRows(
        name=name,
        path=tuple(path),
        offsets=tuple(offsets),
        sizes=tuple(values.size()),
        unsharded_size=tuple(unsharded_size),
        dtype=values.dtype,
        first_byte=part.tensor_bytes,
    )
    part.places.append(place)
    part.values.append(values)
