"""Memory of a simulated device: who uses which bytes, and what the caching allocator may hand out again.

Memory belongs to the stream on which it was allocated. Once free, it is handed out to the next allocation of that
stream, without waiting for anybody: so whoever used it on another stream must be ordered before that allocation, or
have been announced by ``record_stream``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.support.stream_order.streams import Stream

Place = tuple[tuple[Any, int], ...]  # where an operation was called: functions and instructions, the innermost first


@dataclass(slots=True)
class Use:
    """The last use of some bytes by one stream."""

    stream: Stream
    operations: int
    writes: bool
    first: int
    end: int
    place: Place

    def conflicts(self, *, writes: bool, first: int, end: int) -> bool:
        """Whether a use of the bytes from ``first`` to ``end`` must be ordered after this one."""
        return (writes or self.writes) and self.first < end and first < self.end

    def is_over(self, stream: Stream) -> bool:
        """Whether this use is over when ``stream`` runs its next operation."""
        return stream.has_seen(self.stream.number, self.operations)


@dataclass
class Block:
    """The memory of one storage from its allocation until it is freed."""

    stream: Stream
    uses: dict[Any, Use] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    on_host: bool = False

    def add(self, use: Use) -> None:
        self.uses[use.stream, use.writes, use.first, use.end] = use


class Memory:
    """All memory of a simulated device.

    Args:
        report: Called with the kind of a problem, and the places of the two operations that are not ordered.
        default_stream: Stream that owns what was there before the simulation.
    """

    def __init__(self, report: Callable[[str, Place, Place], None], default_stream: Stream) -> None:
        self._report = report
        self._default_stream = default_stream
        self._blocks: dict[int, tuple[StorageWeakRef, Block]] = {}  # by address of the storage
        self._free: dict[Stream, list[Block]] = defaultdict(list)

    def use(self, tensor: Tensor, stream: Stream, *, writes: bool, place: Place) -> None:
        """Use the bytes of ``tensor`` in an operation of ``stream``."""
        if not tensor.numel():
            return
        block = self.block_of(tensor)
        first, end = _extent(tensor)
        for use in block.uses.values():
            conflicts = use.stream is not stream and use.conflicts(writes=writes, first=first, end=end)
            if conflicts and not use.is_over(stream):
                kinds = f"{'written' if use.writes else 'read'} on {use.stream.name}"
                also = f"{'written' if writes else 'read'} on {stream.name}"
                self._report(f"race: {kinds} and {also} in no order", use.place, place)
        block.add(Use(stream, stream.operations, writes, first, end, place))

    def knows(self, tensor: Tensor) -> bool:
        """Whether the storage of ``tensor`` was used or allocated before."""
        return tensor.untyped_storage()._cdata in self._blocks

    def block_of(self, tensor: Tensor) -> Block:
        """The block of a tensor; memory that was there before the simulation belongs to the default stream."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._blocks:
            self._blocks[storage._cdata] = (StorageWeakRef(storage), Block(self._default_stream))
        return self._blocks[storage._cdata][1]

    def allocate(self, storage: Any, stream: Stream, *, place: Place) -> None:
        """Allocate ``storage`` on ``stream``, which may get any memory that was freed there.

        Other streams may use it only after the operations that ``stream`` has enqueued by now, which may use that
        memory: the allocation counts as a write.
        """
        self._collect()
        for block in self._free.pop(stream, []):
            for use in block.uses.values():
                if use.stream is not stream and use.stream not in block.recorded and not use.is_over(stream):
                    kind = "written" if use.writes else "read"
                    self._report(f"reused on {stream.name} while {kind} on {use.stream.name}", use.place, place)
        block = Block(stream)
        block.add(Use(stream, stream.operations, True, 0, storage.nbytes(), place))
        self._blocks[storage._cdata] = (StorageWeakRef(storage), block)

    def free(self, storage: Any) -> None:
        """Free what ``storage`` holds now; it may be allocated again."""
        known = self._blocks.pop(storage._cdata, None)
        if known is not None:
            self._free[known[1].stream].append(known[1])

    def _collect(self) -> None:
        """Free the memory of storages that are gone."""
        # a weak reference is the address of its storage: all of them are asked before each allocation
        for address in list(filter(torch.UntypedStorage._expired, self._blocks)):
            _, block = self._blocks.pop(address)
            self._free[block.stream].append(block)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an argument or result of an operation."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for each in value:
            if isinstance(each, Tensor):
                found.append(each)
            elif isinstance(each, (list, tuple)):
                found += tensors_in(each)
    return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one after its last."""
    if tensor.is_contiguous():
        first = tensor.storage_offset() * tensor.element_size()
        return first, first + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()
