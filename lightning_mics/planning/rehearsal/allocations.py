"""Allocations of operations on real or fake tensors: bytes by category, now and at the peak.

Every tensor that an operation creates counts until the last reference to it is gone, or FSDP2 empties its storage. The
purpose of a tensor is often known only later, when a collective takes it or a parameter owns it; its category is
assigned then, and also for the peak if the tensor existed at the peak. Tensors in host memory have a category of their
own, and are no part of the peak.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_mics._torch.dtensors.owned_rows import elements_here
from lightning_mics._torch.fake import tree_leaves, watched_resizes
from lightning_mics._torch.host_memory import is_allocating_on_host
from lightning_mics._torch.units.on_host import COPIES_IN
from lightning_mics.planning.rehearsal.observed import Observer

UNKNOWN = "activations"  # every tensor without another category


ON_HOST = "host memory"


GATHERED = "gathered parameters"  # the only tensors whose storages FSDP2 empties and fills


@dataclass
class _Block:
    category: str
    size_bytes: int
    born: int  # number of the allocation


class Allocations(Observer):
    """Counts the bytes of all tensors that operations create.

    To be entered together with :class:`~lightning_mics.planning.rehearsal.observed.Observed`.

    Args:
        category: Function that returns the first category of a new tensor.

    Attributes:
        on_host_bytes: Bytes of all tensors that were created in host memory.
    """

    def __init__(self, *, category: Callable[[Tensor], str] = lambda _: UNKNOWN) -> None:
        self._category = category
        self._blocks: dict[int, _Block] = {}  # by storage
        self._live: Counter[str] = Counter()
        self._entered = ExitStack()
        self._allocations = 0
        self.on_host_bytes = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Set the peak to the current bytes."""
        self._peak = Counter(self._live)
        self._peak_bytes = self._on_device()
        self._peak_at = self._allocations

    @property
    def live(self) -> dict[str, int]:
        """Bytes now, by category."""
        return dict(+self._live)

    @property
    def peak(self) -> dict[str, int]:
        """Bytes at the peak of the total, by category."""
        return dict(+self._peak)

    @property
    def peak_bytes(self) -> int:
        """Most bytes on the device at any moment since :meth:`reset_peak`."""
        return self._peak_bytes

    def move_to_host(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors`` to host memory from now on.

        Args:
            tensors: Real or fake tensors ``[...]``; tensors that are not counted are ignored.
        """
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                self._live[block.category] -= block.size_bytes
                self._live[ON_HOST] += block.size_bytes
                block.category = ON_HOST

    def assign(self, category: str, tensors: Iterable[Tensor], *, over: str | None = None) -> None:
        """Assign a category to ``tensors``; tensors that are not counted are ignored.

        Args:
            category: Category to assign.
            tensors: Real or fake tensors ``[...]``; of DTensors the local part.
            over: Category that is replaced; None replaces any.
        """
        for tensor in tensors:
            local = elements_here(tensor)
            block = self._blocks.get(local.untyped_storage()._cdata)
            if block is None or block.category in (category, ON_HOST) or over not in (None, block.category):
                continue
            for counter in (self._live, self._peak) if block.born <= self._peak_at else (self._live,):
                counter[block.category] -= block.size_bytes
                counter[category] += block.size_bytes
            block.category = category

    def __enter__(self) -> Allocations:
        self._entered.enter_context(watched_resizes(self._resized))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    @override
    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """Count what FSDP2 copies to the device for a gather of shards in host memory, for the moment that it exists.

        On a CPU FSDP2 copies nothing, so that ``operation`` gets the shards themselves.
        """
        if operation._schema.name != COPIES_IN:
            return
        blocks = ((self._blocks.get(tensor.untyped_storage()._cdata), tensor) for tensor in args[0])
        copied_bytes = sum(tensor.nbytes for block, tensor in blocks if block and block.category == ON_HOST)
        self._grow(GATHERED, copied_bytes)
        self._live[GATHERED] -= copied_bytes

    @override
    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Count the tensors that ``operation`` has created."""
        if operation.is_view:
            return
        if is_allocating_on_host():
            self.on_host_bytes += sum(tensor.nbytes for tensor in _local_tensors(result))
        new = [tensor for tensor in _local_tensors(result) if tensor.untyped_storage()._cdata not in self._blocks]
        if not new:
            return
        given = {tensor.untyped_storage()._cdata for tensor in _local_tensors((args, kwargs))}
        for tensor in new:
            storage = tensor.untyped_storage()
            is_seen = storage._cdata in given or storage._cdata in self._blocks
            if not is_seen:
                self._add(storage, ON_HOST if is_allocating_on_host() else self._category(tensor))

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        self._allocations += 1
        self._blocks[key] = _Block(category, storage.nbytes(), self._allocations)
        self._grow(category, storage.nbytes())
        weakref.finalize(storage, self._release, key)

    def _grow(self, category: str, size_bytes: int) -> None:
        self._live[category] += size_bytes
        total = self._on_device()
        if total > self._peak_bytes:
            self._peak, self._peak_bytes, self._peak_at = Counter(self._live), total, self._allocations

    def _on_device(self) -> int:
        return self._live.total() - self._live[ON_HOST]

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._live[block.category] -= block.size_bytes

    def _resized(self, storage: torch.UntypedStorage, before_bytes: int) -> None:
        block = self._blocks.get(storage._cdata)
        if block is None:
            return
        self._live[block.category] -= before_bytes
        self._allocations += 1
        block.category, block.size_bytes, block.born = GATHERED, storage.nbytes(), self._allocations
        self._grow(GATHERED, block.size_bytes)


def _local_tensors(values: Any) -> Iterator[Tensor]:
    for value in (values,) if isinstance(values, Tensor) else tree_leaves(values):
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            yield value
