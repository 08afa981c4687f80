"""The table of a part: where in its bytes each tensor is, and where in the checkpoint its values belong."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

ALIGNED_TO = 64  # bytes: a line of the cache
MOST_TABLE_BYTES = 2**30


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor in a part, or all of it.

    Attributes:
        name: Name of the entry in the checkpoint, dotted.
        path: Keys of the entry in nested dictionaries.
        offsets: Position of the first value in the unsharded tensor, one number per dimension.
        sizes: Size of what is stored, one number per dimension.
        unsharded_size: Size of the unsharded tensor, one number per dimension.
        dtype: Type of the values.
        first_byte: Position in the part.
    """

    name: str
    path: tuple[str | int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    unsharded_size: tuple[int, ...]
    dtype: torch.dtype
    first_byte: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return prod(self.sizes) * self.dtype.itemsize


def aligned(size_bytes: int) -> int:
    """The next position at which a tensor may begin."""
    return -(-size_bytes // ALIGNED_TO) * ALIGNED_TO


def end_of(places: Sequence[StoredRows]) -> int:
    """Where the tensors of a part end, and its pickled entries begin."""
    return places[-1].first_byte + aligned(places[-1].size_bytes) if places else 0


def joined(objects: bytes, meta: bytes) -> bytes:
    """Pickled values of tensors' neighbors, and pickled entries, in one.

    Args:
        objects: Values of the model's and the optimizers' states that are not tensors.
        meta: Everything else.
    """
    return len(objects).to_bytes(8, "big") + objects + meta


def split(content: bytes) -> tuple[bytes, bytes]:
    """The inverse of :func:`joined`."""
    end = 8 + int.from_bytes(content[:8], "big")
    return content[8:end], content[end:]


def encoded(places: Sequence[StoredRows]) -> bytes:
    """The table as bytes."""
    rows = [
        [p.name, p.path, p.offsets, p.sizes, p.unsharded_size, str(p.dtype).removeprefix("torch."), p.first_byte]
        for p in places
    ]
    return zlib.compress(json.dumps(rows).encode())


def decoded(table: bytes) -> list[StoredRows]:
    """The places in a table.

    Raises:
        ValueError: If it is not a table.
    """
    unpacking = zlib.decompressobj()
    try:
        rows = json.loads(unpacking.decompress(table, MOST_TABLE_BYTES))
        if unpacking.unconsumed_tail or not unpacking.eof:
            raise ValueError("it is too large, or cut short")
        return [_place(*row) for row in rows]
    except (ValueError, TypeError, AttributeError, zlib.error) as error:
        raise ValueError(f"not a table of tensors: {error}") from None


def _place(
    name: str, path: list[Any], offsets: list[int], sizes: list[int], unsharded: list[int], dtype: str, first_byte: int
) -> StoredRows:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype) or any(not isinstance(key, str | int) for key in path):
        raise ValueError(f"{name!r} has the type {dtype!r} or the path {path!r}")
    whole = tuple(map(int, (*offsets, *sizes, *unsharded, first_byte)))
    if any(number < 0 for number in whole):
        raise ValueError(f"{name!r} has negative sizes")
    count = len(sizes)
    return StoredRows(
        str(name), tuple(path), whole[:count], whole[count : 2 * count], whole[2 * count : -1], kind, whole[-1]
    )
