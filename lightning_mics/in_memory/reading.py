"""Reading a step from the keepers that hold it, by ``torch.distributed.checkpoint``, on any number of ranks."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.foreign.translation import Translated
from lightning_mics.checkpoint.opening import OpenCheckpoint
from lightning_mics.checkpoint.storage.manifest import Manifest
from lightning_mics.collectives.agreement import on_all_ranks
from lightning_mics.in_memory.holdings import Key
from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.keeper.memory import BLOCK_BYTES, CRC_BYTES, Stamp
from lightning_mics.in_memory.keeper.wire import KeeperError
from lightning_mics.in_memory.slots import checksums_of
from lightning_mics.in_memory.table import StoredRows, decoded, end_of, split

MOST_BYTES_AT_ONCE = 2**26


class Keepers:
    """The keepers of all nodes, as one rank reaches them.

    Args:
        addresses: Host and port of each node's keeper.
        own: Connection to that of this node.
        own_node: This node.
        is_first: Whether this rank is the first of its node.
        token: Secret of the job.
    """

    def __init__(
        self, addresses: Sequence[Sequence[Any]], *, own: KeeperConnection, own_node: int, is_first: bool, token: str
    ) -> None:
        self.own_node = own_node
        self.is_first = is_first
        self._addresses = addresses
        self._token = token
        self._connections = {own_node: own}

    def ask(
        self, node: int, request: dict[str, Any], *, into: memoryview | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Ask the keeper of a node.

        Args:
            node: Number of the node.
            request: Request.
            into: Memory for the payload of the answer: [bytes].

        Raises:
            KeeperError: If it cannot be reached, or refuses.
        """
        if node not in self._connections:
            self._connections[node] = KeeperConnection.remote(self._addresses[node], token=self._token)
        return self._connections[node].ask(request, into=into)

    def close(self) -> None:
        """Close the connections to other nodes."""
        for node, connection in self._connections.items():
            if node != self.own_node:
                connection.close()


class StoredPart:
    """A part of a step on one or more nodes; what is read is compared with its checksums.

    Args:
        keepers: The keepers.
        stamp: Step.
        key: Kind and rank.
        nodes: Nodes that hold it.

    Attributes:
        key: Kind and rank.
    """

    def __init__(self, keepers: Keepers, stamp: Stamp, key: Key, nodes: Sequence[int]) -> None:
        self._keepers = keepers
        self._what = {
            "kind": key[0],
            "rank": key[1],
            "stamp": [stamp.generation, stamp.step, stamp.world_size],
        }
        self.key = key
        self._step = stamp.step
        self._nodes = sorted(nodes, key=lambda node: node != keepers.own_node)
        self._facts: dict[int, tuple[int, bytes]] = {}  # size and checksums, by node
        self._last: tuple[int, bytearray] = (0, bytearray())  # first byte, content

    def table(self) -> bytes:
        """The table of the tensors in it."""
        table: bytes = self._of_any_node(self._table_of, "the table")
        return table

    @property
    def size_bytes(self) -> int:
        """Bytes of the part."""
        size: int = self._of_any_node(lambda node: self._facts_of(node)[0], "the size")
        return size

    def read(self, first: int, count: int, what: str) -> memoryview:
        """Bytes of the part, from the first node that has them undamaged.

        Args:
            first: Position of the first byte.
            count: Number of bytes.
            what: What they are, for the error.

        Raises:
            DamagedCheckpointError: If no node has them undamaged.
        """
        start, content = self._last
        if not start <= first <= first + count <= start + len(content):
            start = first // BLOCK_BYTES * BLOCK_BYTES
            content = self._of_any_node(lambda node: self._blocks(node, start, first + count), what)
            self._last = start, content
        return memoryview(content)[first - start : first - start + count]

    def _blocks(self, node: int, start: int, end: int) -> bytearray:
        size, checksums = self._facts_of(node)
        end = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size)
        content = bytearray(end - start)
        view = memoryview(content)
        for at in range(start, end, MOST_BYTES_AT_ONCE):
            count = min(MOST_BYTES_AT_ONCE, end - at)
            request = {"do": "read", **self._what, "first": at, "count": count}
            self._keepers.ask(node, request, into=view[at - start : at - start + count])
        first, found = start // BLOCK_BYTES * CRC_BYTES, checksums_of(view)
        if found != checksums[first : first + len(found)]:
            raise _DamagedError(f"node {node} has it altered: its checksum is another")
        return content

    def _facts_of(self, node: int) -> tuple[int, bytes]:
        if node not in self._facts:
            self._table_of(node)
        return self._facts[node]

    def _table_of(self, node: int) -> bytes:
        facts, payload = self._keepers.ask(node, {"do": "facts", **self._what})
        self._facts[node] = int(facts["bytes"]), payload[int(facts["table_bytes"]) :]
        return payload[: int(facts["table_bytes"])]

    def _of_any_node(self, ask: Any, what: str) -> Any:
        problems: list[Exception] = []
        for node in self._nodes:
            try:
                return ask(node)
            except (_DamagedError, KeeperError) as error:
                problems.append(error)
        corrupted = DamagedCheckpointError(
            f"step {self._step} in memory is corrupted: {what} of rank {self._what['rank']}: "
            f"{'; '.join(map(str, problems))}"
        )
        corrupted.comes_again = all(isinstance(problem, _DamagedError) for problem in problems)  # no node has died
        raise corrupted


class _DamagedError(Exception):
    """Bytes differ from their checksum."""


@dataclass(frozen=True)
class _Place:
    part: StoredPart
    place: StoredRows


@dataclass(frozen=True, kw_only=True)
class InMemoryCheckpoint(OpenCheckpoint):
    """A step in memory, opened as a sharded checkpoint is.

    Attributes:
        parts: Parts by kind and rank.
        tables: Tables of the parts.
        weights_only: Whether entries other than tensors must be plain data.
    """

    parts: Mapping[Key, StoredPart]
    tables: Mapping[Key, bytes]
    weights_only: bool

    @classmethod
    def open(
        cls, name: Any, keepers: Keepers, stamp: Stamp, nodes: Mapping[Key, list[int]], *, weights_only: bool
    ) -> InMemoryCheckpoint:
        """Open a step; every rank calls it, and one of the first node that holds a part reads its table.

        Args:
            name: Name, for messages.
            keepers: The keepers of all nodes.
            stamp: Step.
            nodes: Nodes that hold each part.
            weights_only: Whether entries other than tensors must be plain data.
        """
        parts = {key: StoredPart(keepers, stamp, key, found) for key, found in nodes.items()}
        tables: dict[Key, bytes] = {}
        own = [key for key in parts if keepers.is_first and min(nodes[key]) == keepers.own_node]
        for of_rank in on_all_ranks(lambda: {key: parts[key].table() for key in own}):
            tables.update(of_rank)
        manifest = Manifest.now({}, world_size=stamp.world_size)
        return cls(path=name, manifest=manifest, parts=parts, tables=tables, weights_only=weights_only)

    def meta(self, *, weights_only: bool) -> dict[str, Any]:
        """The entries that are neither the model's nor an optimizer's.

        Args:
            weights_only: Whether only plain data and tensors are allowed.
        """
        meta: dict[str, Any] = load_value(
            io.BytesIO(split(self.pickled)[1]), name=str(self.path), weights_only=weights_only
        )
        return meta

    @cached_property
    def objects(self) -> dict[str, tuple[Any, Any]]:
        """Path and value of what is neither a tensor nor an entry, by its dotted name."""
        value: dict[str, tuple[Any, Any]] = load_value(
            io.BytesIO(split(self.pickled)[0]), name=str(self.path), weights_only=self.weights_only
        )
        return value

    @cached_property
    def pickled(self) -> bytes:
        """What rank 0 has pickled, as bytes."""
        part, places = self.parts["private", 0], self._places["private", 0]
        start = end_of(places)
        return bytes(part.read(start, part.size_bytes - start, "the entries"))

    @cached_property
    def _places(self) -> dict[Key, list[StoredRows]]:
        try:
            return {key: decoded(table) for key, table in self.tables.items()}
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path} is corrupted: {error}") from None

    @cached_property
    def described(self) -> Translated:
        """Metadata of all parts."""
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        found: dict[MetadataIndex, _Place] = {}
        paths: dict[str, Any] = {}
        for key, places in sorted(self._places.items()):
            for place in places:
                described = tensors.setdefault(
                    place.name,
                    TensorStorageMetadata(
                        TensorProperties(dtype=place.dtype), torch.Size(place.unsharded_size), chunks=[]
                    ),
                )
                assert isinstance(described, TensorStorageMetadata)
                described.chunks.append(ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes)))
                found[MetadataIndex(place.name, torch.Size(place.offsets))] = _Place(self.parts[key], place)
                paths[place.name] = place.path
        for name, (path, _) in self.objects.items():
            tensors[name] = BytesStorageMetadata()
            paths[name] = tuple(path)
        return Translated(metadata=Metadata(tensors, planner_data=paths, storage_data=found))

    @cached_property
    def reader(self) -> Any:
        """Reader of the tensors and their metadata."""
        return _PartReader(self)


class _PartReader(StorageReader):
    """DCP's reader over keepers."""

    def __init__(self, checkpoint: InMemoryCheckpoint) -> None:
        self._checkpoint = checkpoint

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a reader belongs to one step."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = self._checkpoint.described.metadata
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._found: dict[MetadataIndex, _Place] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan, part by part in the order of bytes."""
        by_part: dict[StoredPart, list[tuple[StoredRows, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_object(item, planner)
                continue
            found = self._found[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            by_part[found.part].append((found.place, item))
        for part, items in by_part.items():
            for place, item in sorted(items, key=lambda entry: entry[0].first_byte):
                target = planner.resolve_tensor(item).detach()
                target.copy_(_values(part, place, item))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _load_object(self, item: ReadItem, planner: LoadPlanner) -> None:
        _, value = self._checkpoint.objects[item.storage_index.fqn]
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        planner.load_bytes(item, stream)


def _values(part: StoredPart, place: StoredRows, item: ReadItem) -> torch.Tensor:
    """The values of an item: [lengths]."""
    what, sizes = place.name, place.sizes
    if sizes and tuple(item.lengths[1:]) == sizes[1:]:  # full rows
        row_bytes = prod(sizes[1:]) * place.dtype.itemsize
        first, count = place.first_byte + item.storage_offsets[0] * row_bytes, item.lengths[0] * row_bytes
        if not count:
            return torch.empty(item.lengths, dtype=place.dtype)
        return torch.frombuffer(part.read(first, count, what), dtype=place.dtype).view(item.lengths)
    if not place.size_bytes:
        return torch.empty(sizes, dtype=place.dtype)
    whole = torch.frombuffer(part.read(place.first_byte, place.size_bytes, what), dtype=place.dtype).view(sizes)
    return narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
