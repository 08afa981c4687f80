"""What is allocated while operations run, real or on fake tensors: bytes by category, now and at the peak.

Every tensor that an operation makes counts until the last reference to it is gone, or FSDP2 has emptied its storage.
What a tensor is for often shows only later, when a collective takes it or a parameter owns it; it is given its category
then, for the peak as well if it lived at it.
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

from lightning_mics._torch.fake import tree_leaves, watched_resizes

UNKNOWN = "activations"  # what nobody else claims


GATHERED = "gathered parameters"  # whose storages FSDP2 empties and fills, and no others


@dataclass
class _Block:
    category: str
    size_bytes: int
    born: int  # the number of allocations before it


class Allocations:
    """Counts the bytes of all tensors that operations make; to be told of them by
    :class:`~lightning_mics.planning.rehearsal.observed.Observed`, and entered with it.

    Args:
        counts: Whether a tensor counts; None is all.
    """

    def __init__(self, *, counts: Callable[[Tensor], bool] | None = None) -> None:
        self._counts = counts
        self._blocks: dict[int, _Block] = {}  # by storage
        self._live: Counter[str] = Counter()
        self._entered = ExitStack()
        self._allocations = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far: it is what is there now."""
        self._peak = Counter(self._live)
        self._peak_bytes = self._live.total()
        self._peak_at = self._allocations

    @property
    def live(self) -> dict[str, int]:
        """Bytes now, by category."""
        return dict(+self._live)

    @property
    def peak(self) -> dict[str, int]:
        """Bytes when there were the most, by category."""
        return dict(+self._peak)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were there at any moment."""
        return self._peak_bytes

    def assign(self, category: str, tensors: Iterable[Tensor], *, over: str | None = None) -> None:
        """Say what ``tensors`` are for; what is not known is left out.

        Args:
            category: What they are.
            tensors: Real, fake, or DTensors, whose local part is meant.
            over: Only where that was their category.
        """
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            block = self._blocks.get(local.untyped_storage()._cdata)
            if block is None or block.category == category or over not in (None, block.category):
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

    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """Nothing has been allocated yet."""

    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Count what ``operation`` has made."""
        if operation.is_view:
            return
        for tensor in _plain_tensors(result):
            known = tensor.untyped_storage()._cdata in self._blocks
            if not known and (self._counts is None or self._counts(tensor)) and not _is_view(tensor, args, kwargs):
                self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._allocations += 1
        self._blocks[key] = _Block(UNKNOWN, storage.nbytes(), self._allocations)
        self._grow(UNKNOWN, storage.nbytes())
        weakref.finalize(storage, self._release, key)

    def _grow(self, category: str, size_bytes: int) -> None:
        self._live[category] += size_bytes
        total = self._live.total()
        if total > self._peak_bytes:
            self._peak, self._peak_bytes, self._peak_at = Counter(self._live), total, self._allocations

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


def _plain_tensors(values: Any) -> Iterator[Tensor]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            yield value


def _is_view(result: Tensor, *arguments: Any) -> bool:
    """Whether an operation has returned memory of what it was given."""
    storage = result.untyped_storage()._cdata
    return any(given.untyped_storage()._cdata == storage for given in _plain_tensors(arguments))
