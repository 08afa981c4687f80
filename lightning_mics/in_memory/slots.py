"""A rank's view of its two slots, which it shares with the keeper of its node."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_mics._torch.host_memory import pin, unpin
from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.keeper.memory import BLOCK_BYTES, CRC_BYTES, PAGE_BYTES, PartLayout, offsets_of
from lightning_mics.in_memory.plan import Part


class Slots:
    """The slots of one layout, mapped into this process.

    Args:
        connection: Connection to the keeper of this node.
        rank: This rank.
        layouts: Layouts of the parts that a slot holds.
        device: Device of the tensors.

    Raises:
        KeeperError: If the keeper cannot make them.
    """

    def __init__(
        self, connection: KeeperConnection, *, rank: int, layouts: Sequence[PartLayout], device: torch.device
    ) -> None:
        answer, _ = connection.ask(
            {"do": "open", "rank": rank, "parts": [layout.plain() for layout in layouts]},
            *(layout.table for layout in layouts),
        )
        self._device = device
        self._first = offsets_of(layouts)[:-1]
        self._memory: list[Tensor] = []  # each [bytes], uint8
        self._views: list[memoryview] = []
        for descriptor in connection.receive_descriptors(2):
            mapped = mmap.mmap(descriptor, max(int(answer["slot_bytes"]), PAGE_BYTES))
            os.close(descriptor)
            mapped.madvise(mmap.MADV_DONTFORK)  # workers of data loaders must not keep it
            self._views.append(memoryview(mapped))
            self._memory.append(torch.frombuffer(mapped, dtype=torch.uint8))
            pin(self._memory[-1], device)

    def targets(self, slot: int, parts: Sequence[Part]) -> Iterable[tuple[Tensor, Tensor]]:
        """Where tensors are copied to: their values, each [any], and memory of the same shape.

        Args:
            slot: Number of a slot.
            parts: Parts with their tensors.
        """
        for first, part in zip(self._first, parts, strict=True):
            for place, values in zip(part.places, part.values, strict=True):
                start = first + place.first_byte
                memory = self._memory[slot][start : start + place.size_bytes]
                yield values, memory.view(place.dtype).view(place.sizes)

    def write(self, slot: int, number: int, first_byte: int, content: bytes | memoryview) -> None:
        """Write bytes into a part.

        Args:
            slot: Number of a slot.
            number: Number of the part.
            first_byte: Position in the part.
            content: The bytes.
        """
        start = self._first[number] + first_byte
        self._views[slot][start : start + len(content)] = content

    def checksums(self, slot: int, sizes: Sequence[int]) -> bytes:
        """Checksums of the blocks of all parts.

        Args:
            slot: Number of a slot.
            sizes: Bytes of each part.
        """
        view = self._views[slot]
        return b"".join(
            checksums_of(view[first : first + size]) for first, size in zip(self._first, sizes, strict=True)
        )

    def close(self) -> None:
        """Give the memory back; the keeper still has it."""
        for memory in self._memory:
            unpin(memory, self._device)
        self._memory.clear()
        self._views.clear()


def checksums_of(content: memoryview) -> bytes:
    """CRC-32 of each block of ``content``, four bytes each."""
    blocks = range(0, content.nbytes, BLOCK_BYTES)
    return b"".join(zlib.crc32(content[first : first + BLOCK_BYTES]).to_bytes(CRC_BYTES, "big") for first in blocks)
