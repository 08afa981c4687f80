"""Weights that stay gathered after their use, and the watch that they are not used once they have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class KeptCopy:
    """What one unit (a block, or what the root holds) has gathered, for the next time.

    All ranks must come to the same decision, or they would wait for each other: weights are changed by all or by none.

    Args:
        version: Returns what differs after each change of the unit's weights that torch knows of.
    """

    def __init__(self, version: Callable[[], Hashable]) -> None:
        self._version = version
        self._kept_version: Hashable = None
        self._differs: Tensor | None = None  # [], bool: whether a shard was not what its copy says

    @property
    def usable(self) -> bool:
        """Whether there is a copy, and no change of the weights since that torch knows of."""
        return self._kept_version is not None and self._kept_version == self._version()

    def made(self) -> None:
        """There is a copy now, of the weights as they are."""
        self._kept_version = self._version()

    def drop(self) -> None:
        """Forget the copy: the next use gathers."""
        self._kept_version = None

    def tensors(self) -> list[Tensor]:
        """What is kept now."""
        raise NotImplementedError

    def compare(self, own: Tensor, shard: Tensor) -> None:
        """Note whether this rank's ``own`` part of the copy is its ``shard`` still; does not wait for a device."""
        if own.is_cuda:
            differs = _bits_differ(own, shard)
            self._differs = differs if self._differs is None else self._differs | differs
        elif not torch.equal(own, shard) and _bits_differ(own, shard):
            self._differs = torch.tensor(True)

    def take_differs(self) -> Tensor | None:
        """Whether a copy was used that was not what its shard held by then: [], or None if no copy is known to be."""
        differs, self._differs = self._differs, None
        return differs


def _bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether the tensors differ, [], where not-a-number equals itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size(), torch.uint8)
    return (one.view(bits) != other.view(bits)).any()
