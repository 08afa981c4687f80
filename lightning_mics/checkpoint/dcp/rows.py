"""Which rows of a checkpoint's tensors each rank writes and reads, so that all replicas share the work.

A partition group holds each tensor in shards, and every replica holds the same shards. Here the replicas divide each
shard by rows, so that every byte of a checkpoint is written by one rank and read by one rank::

    shard of 8 rows                    replica 0    replica 1    replica 2
    writes, and reads from storage     rows 0, 1    rows 2, 3    rows 4, 5
    remaining rows, small shards       the replica with the fewest bytes so far: 6, 7
    after reading                      each receives the others' rows over the replication group

torch's ``dedup_save_plans`` divides by stored tensors and not by rows, and after planning, when an asynchronous save
must have copied its rows already.
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

SMALLEST_BYTES = 2**14  # of rows with an entry of their own in a checkpoint, which takes about 1 kB


def divide(tensors: Mapping[str, DTensor]) -> dict[str, DividedShard]:
    """Divide the shards of ``tensors``, by FQN; all ranks must pass the same names.

    Raises:
        ValueError: If a tensor is replicated over more than one axis of its mesh.
    """
    taken_bytes: dict[int, list[int]] = {}  # bytes of each replica, by number of replicas
    divided = {}
    for name in sorted(tensors):
        replicas, replica, group = _replicas(name, tensors[name])
        loads = taken_bytes.setdefault(replicas, [0] * replicas)
        rows = tuple(_rows(tensors[name], loads))
        divided[name] = DividedShard(rows, tensors[name].size(), replica, group)
    return divided


@dataclass(frozen=True)
class DividedShard:
    """This rank's shard of one tensor, divided among replicas.

    Attributes:
        rows: Rows of all replicas; first the equal parts, if the shard is large enough, in the order of replicas.
        unsharded_size: Size of the unsharded tensor, one number per dimension.
        replica: The replica that this rank belongs to.
        replication: Process group of the ranks that hold the same shard; None if there is one replica.
    """

    rows: tuple[Rows, ...]
    unsharded_size: torch.Size
    replica: int
    replication: dist.ProcessGroup | None

    def own(self) -> Iterator[Rows]:
        """The rows that this rank writes and reads."""
        return (rows for rows in self.rows if rows.replica == self.replica)

    def begin_exchange(self) -> list[dist.Work]:
        """Begin to send this rank's rows to the other replicas and to receive theirs; wait for what it returns.

        Every rank of the replication group calls it. Broadcasts need no copy, and many may be in flight.
        """
        if self.replication is None:
            return []
        begun = (
            dist.broadcast(rows.values, group=self.replication, group_src=rows.replica, async_op=True)
            for rows in self.rows
        )
        return [work for work in begun if work is not None]


@dataclass(frozen=True)
class Rows:
    """Rows of a shard that one replica writes and reads.

    Attributes:
        values: View of the rows in the shard, [rows, ...]; for a shard without dimensions the shard, [].
        offsets: Position of the first value in the unsharded tensor, one number per dimension.
        replica: The replica that writes and reads them.
    """

    values: Tensor
    offsets: torch.Size
    replica: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The place of the rows in the unsharded tensor."""
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.values.size())


def _replicas(name: str, tensor: DTensor) -> tuple[int, int, dist.ProcessGroup | None]:
    """The number of replicas, the replica that this rank belongs to, and their process group."""
    mesh = tensor.device_mesh
    axes = [
        axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate() and mesh.size(axis) > 1
    ]
    if len(axes) > 1:
        raise ValueError(f"{name} is replicated over {len(axes)} axes of {mesh}; checkpoints support one")
    if not axes:
        return 1, 0, None
    return mesh.size(axes[0]), mesh.get_local_rank(axes[0]), mesh.get_group(axes[0])


def _rows(tensor: DTensor, loads: list[int]) -> Iterator[Rows]:
    """Divide a shard, and add each replica's bytes to ``loads``."""
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
    """The place of this rank's shard in the unsharded tensor, by the method that DCP calls.

    A tensor that is partial over an axis is one of its own at each position: all of it is here.
    """
    if any(placement.is_partial() for placement in tensor.placements):
        return [ChunkStorageMetadata(offsets=torch.Size([0] * tensor.ndim), sizes=tensor.size())]
    chunks: list[Any] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return chunks


def _narrow(shard: Tensor, chunk: ChunkStorageMetadata, *, first: int, count: int, replica: int) -> Rows:
    if not shard.ndim:
        return Rows(shard, chunk.offsets, replica)
    offsets = torch.Size((chunk.offsets[0] + first, *chunk.offsets[1:]))
    return Rows(shard[first : first + count], offsets, replica)
