"""What a keeper holds: areas of two slots, each slot one complete optimizer step or nothing.

::

    area of rank 3   slot 0   step 26 of generation 1    private | rows | rows of rank 7     complete
                     slot 1   (step 27 is being written)                                     empty

A *part* is what a rank saves of itself: ``private`` is what no other rank has, such as the states of its random number
generators; ``rows`` are its rows of the sharded tensors. A slot of a rank also holds the rows of a replica of another
node, and an area that another keeper has sent holds what it sends. The memory is anonymous (memfd): no file system, no
name, and it is gone with the last process that has it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PAGE_BYTES = 4096  # parts begin at a page
BLOCK_BYTES = 2**20  # of a part, with a checksum of its own
CRC_BYTES = 4
MOST_SLOT_BYTES = 2**44


class Stamp(NamedTuple):
    """An optimizer step of a run.

    Attributes:
        generation: Number of the start of the job that has saved it; a resumed job has a larger one.
        step: Number of optimizer steps done.
        world_size: Number of ranks that have saved it.
    """

    generation: int
    step: int
    world_size: int


Keep = tuple[int, int]  # generation and step


@dataclass(frozen=True)
class PartLayout:
    """A part of an area.

    Attributes:
        kind: ``"private"`` or ``"rows"``.
        rank: Rank that the part belongs to.
        capacity_bytes: Largest size.
        table: Description of the tensors in it, which a keeper does not read.
    """

    kind: str
    rank: int
    capacity_bytes: int
    table: bytes

    @property
    def key(self) -> tuple[str, int]:
        """Kind and rank."""
        return self.kind, self.rank

    def plain(self) -> dict[str, Any]:
        """Everything but the table, for a header."""
        return {
            "kind": self.kind,
            "rank": self.rank,
            "capacity": self.capacity_bytes,
            "table_bytes": len(self.table),
        }


def layouts_of(plain: list[dict[str, Any]], tables: bytes) -> list[PartLayout]:
    """The layouts in a header, with their tables.

    Args:
        plain: Entries of :meth:`PartLayout.plain`.
        tables: The tables, one after the other.

    Raises:
        ValueError: If they are not layouts.
    """
    layouts, start = [], 0
    for entry in plain:
        size = int(entry["table_bytes"])
        layout = PartLayout(
            kind=str(entry["kind"]),
            rank=int(entry["rank"]),
            capacity_bytes=int(entry["capacity"]),
            table=tables[start : start + size],
        )
        if not 0 <= layout.capacity_bytes <= MOST_SLOT_BYTES or len(layout.table) != size:
            raise ValueError(f"{entry} is not the layout of a part")
        layouts.append(layout)
        start += size
    return layouts


def layout_digest(parts: Sequence[PartLayout]) -> str:
    """Digest of layouts and their tables."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.kind} {part.rank} {part.capacity_bytes} {len(part.table)} ".encode() + part.table)
    return digest.hexdigest()


def offsets_of(parts: Sequence[PartLayout]) -> list[int]:
    """First byte of each part in a slot, and the size of the slot: parts begin at a page."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + -(-part.capacity_bytes // PAGE_BYTES) * PAGE_BYTES)
    return offsets


def block_count(size_bytes: int) -> int:
    """Number of blocks of a part of this size."""
    return -(-size_bytes // BLOCK_BYTES)


@dataclass
class Slot:
    """Memory for one step.

    Attributes:
        descriptor: File descriptor of the memory.
        memory: The memory, mapped.
        stamp: Step in it; None while it is empty or being written.
        sizes: Bytes of each part.
        checksums: CRC-32 of each block of each part, four bytes each.
    """

    descriptor: int
    memory: mmap.mmap
    stamp: Stamp | None = None
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)
    checksums: dict[tuple[str, int], bytes] = field(default_factory=dict)

    @classmethod
    def new(cls, size_bytes: int) -> Slot:
        """Make an empty slot; its pages take memory when they are written."""
        descriptor = os.memfd_create("lightning-mics", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, max(size_bytes, PAGE_BYTES))
        return cls(descriptor, mmap.mmap(descriptor, max(size_bytes, PAGE_BYTES)))

    def clear(self) -> None:
        """Mark the slot as empty, before its first byte changes."""
        self.stamp = None
        self.sizes.clear()
        self.checksums.clear()

    def complete(self, stamp: Stamp, sizes: dict[tuple[str, int], int], checksums: bytes) -> None:
        """Mark the slot as complete.

        Args:
            stamp: Step that was written.
            sizes: Bytes of each part.
            checksums: Checksums of the blocks of all parts, in the order of ``sizes``.

        Raises:
            ValueError: If there are more or fewer checksums than blocks.
        """
        start = 0
        for key, size in sizes.items():
            count = CRC_BYTES * block_count(size)
            self.sizes[key], self.checksums[key] = size, checksums[start : start + count]
            start += count
        if start != len(checksums):
            self.clear()
            raise ValueError(f"{len(checksums)} bytes of checksums instead of {start}")
        self.stamp = stamp

    def close(self) -> None:
        """Give the memory back; a connection that still sends from it keeps it until then."""
        with suppress(BufferError):
            self.memory.close()
        os.close(self.descriptor)


class Area:
    """Two slots of one layout, for what one rank saves.

    Args:
        owner: Rank that saves.
        parts: Layouts of the parts, in their order.
        local: Whether the rank runs on this node; otherwise another keeper sends the parts.

    Attributes:
        offsets: First byte of each part in a slot.
        size_bytes: Size of a slot.
        layout: Digest of the layout: areas with the same one can hold each other's steps.
        protected: Newest step of which another node has what has to be there; of a local area.
    """

    def __init__(self, owner: int, parts: list[PartLayout], *, local: bool) -> None:
        self.owner = owner
        self.parts = {part.key: part for part in parts}
        self.local = local
        *offsets, size = offsets_of(parts)
        self.offsets = dict(zip(self.parts, offsets, strict=True))
        if size > MOST_SLOT_BYTES:
            raise ValueError(f"a slot of {size} bytes is too large")
        self.size_bytes = size
        self.layout = layout_digest(parts)
        self.slots = [Slot.new(size), Slot.new(size)]
        self.protected: Stamp | None = None

    def slot_with(self, keep: Keep) -> int | None:
        """Number of the slot that holds a step; None if none does."""
        kept = [number for number, slot in enumerate(self.slots) if slot.stamp and slot.stamp[:2] == keep]
        return kept[0] if kept else None

    def next_slot(self, keep: Keep) -> int:
        """Number of the slot to write next: not the one with a step that all ranks have, or are loading."""
        kept = self.slot_with(keep)
        if kept is not None:
            return 1 - kept
        stamps = [slot.stamp for slot in self.slots]
        return stamps.index(min(stamps, key=lambda stamp: (stamp is not None, stamp or Stamp(0, 0, 0))))

    def holdings(self) -> Iterator[tuple[Stamp, tuple[str, int], Slot]]:
        """The parts that are complete, with their steps and slots."""
        for slot in self.slots:
            if slot.stamp is not None:
                for key in slot.sizes:
                    yield slot.stamp, key, slot

    def view(self, slot: Slot, key: tuple[str, int], count: int) -> memoryview:
        """Memory of a part.

        Args:
            slot: One of the slots.
            key: Kind and rank of the part.
            count: Number of bytes from its beginning.

        Raises:
            ValueError: If the part is smaller.
        """
        if not 0 <= count <= self.parts[key].capacity_bytes:
            raise ValueError(f"{count} bytes do not fit a part of {self.parts[key].capacity_bytes}")
        first = self.offsets[key]
        return memoryview(slot.memory)[first : first + count]

    def close(self) -> None:
        """Give the memory back."""
        for slot in self.slots:
            slot.close()
