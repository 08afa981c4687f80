"""Which rows of a checkpoint's tensors each rank writes and reads, so that all replicas share the work.

A partition group holds each tensor in shards, and every replica holds the same shards. Here the replicas divide each
shard by rows, so that every byte of a checkpoint is one rank's to write and one rank's to read::

    shard of 8 rows                    replica 0    replica 1    replica 2
    writes, and reads from storage     rows 0, 1    rows 2, 3    rows 4, 5
    rows left over, small shards       whoever has least so far: 6, 7
    after reading                      each gets the others' rows over the replication group
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor

SMALLEST_BYTES = 2**14  # of rows that are worth an entry of their own in a checkpoint, which takes about 1 kB


@dataclass(frozen=True)
class Rows:
    """Rows of a shard that are one replica's to write and to read.

    Attributes:
        values: They are views of the shard, [rows, ...]; a shard without dimensions is itself.
        offsets: Of the first value in the whole tensor.
        replica: Whose they are.
    """

    values: Tensor
    offsets: torch.Size
    replica: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where they are in the whole tensor."""
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.values.size())


@dataclass(frozen=True)
class DividedShard:
    """This rank's shard of one tensor, and how its replicas divide it.

    Attributes:
        rows: Of all replicas; first the equal parts, if the shard is large enough, in the order of replicas.
        whole_size: Of the tensor that the shard is a part of.
        replica: This rank's.
        replication: The ranks that hold the same shard; None if there is one.
    """

    rows: tuple[Rows, ...]
    whole_size: torch.Size
    replica: int
    replication: dist.ProcessGroup | None

    def own(self) -> Iterator[Rows]:
        """The rows that are this rank's."""
        return (rows for rows in self.rows if rows.replica == self.replica)

    def exchange(self) -> None:
        """Give the other replicas this rank's rows, and get theirs; every rank of the replication group calls it."""
        if self.replication is None:
            return
        equal = self.rows[: self.replication.size()] if len(self.rows) >= self.replication.size() else ()
        if equal:
            own = equal[self.replica].values.clone()  # not what is written to
            dist.all_gather([rows.values for rows in equal], own, group=self.replication)
        for rows in self.rows[len(equal) :]:
            dist.broadcast(rows.values, group=self.replication, group_src=rows.replica)


def divide(tensors: Mapping[str, DTensor]) -> dict[str, DividedShard]:
    """Divide the shards of ``tensors``; all ranks must name the same ones.

    Raises:
        ValueError: If a tensor is replicated over more than one axis of its mesh.
    """
    taken_bytes: dict[int, list[int]] = {}  # by number of replicas, of each replica
    divided = {}
    for name in sorted(tensors):
        replicas, replica, group = _replicas(name, tensors[name])
        loads = taken_bytes.setdefault(replicas, [0] * replicas)
        rows = tuple(_rows(tensors[name], loads))
        divided[name] = DividedShard(rows, tensors[name].size(), replica, group)
    return divided


def _replicas(name: str, tensor: DTensor) -> tuple[int, int, dist.ProcessGroup | None]:
    """How many replicas there are, which one this rank belongs to, and the group of them."""
    mesh = tensor.device_mesh
    axes = [
        axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate() and mesh.size(axis) > 1
    ]
    if len(axes) > 1:
        raise ValueError(f"{name} is replicated over {len(axes)} axes of {mesh}; checkpoints know one axis of replicas")
    if not axes:
        return 1, 0, None
    return mesh.size(axes[0]), mesh.get_local_rank(axes[0]), mesh.get_group(axes[0])


def _rows(tensor: DTensor, loads: list[int]) -> Iterator[Rows]:
    """Divide a shard, and count each replica's part into ``loads``."""
    shard, (chunk,) = tensor.to_local().detach(), _chunks(tensor)
    count = shard.size(0) if shard.ndim else 1
    equal = count // len(loads) if shard.nbytes >= SMALLEST_BYTES * len(loads) else 0
    for replica in range(len(loads) if equal else 0):
        yield _narrow(shard, chunk, first=replica * equal, count=equal, replica=replica)
        loads[replica] += shard[:equal].nbytes
    if left := count - equal * len(loads):
        least = loads.index(min(loads))
        yield _narrow(shard, chunk, first=count - left, count=left, replica=least)
        loads[least] += (shard[count - left :] if shard.ndim else shard).nbytes


def _chunks(tensor: DTensor) -> list[Any]:
    """Where this rank's shard is in the whole tensor: what DCP asks a tensor for."""
    chunks: list[Any] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return chunks


def _narrow(shard: Tensor, chunk: ChunkStorageMetadata, *, first: int, count: int, replica: int) -> Rows:
    if not shard.ndim:
        return Rows(shard, chunk.offsets, replica)
    offsets = torch.Size((chunk.offsets[0] + first, *chunk.offsets[1:]))
    return Rows(shard[first : first + count], offsets, replica)
