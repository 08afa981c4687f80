"""Weights that stay gathered after their use, and the watch that they are not used once they have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class KeptCopy:
    """What one unit (a block, or what the root holds) has gathered from a group, for the next time.

    All ranks must come to the same decision, or they would wait for each other: weights are changed by all or by none.

    Args:
        version: Returns what differs after each change of the unit's weights that torch knows of.
    """

    def __init__(self, version: Callable[[], Hashable]) -> None:
        self._version = version
        self._kept: Tensor | None = None
        self._kept_version: Hashable = None
        self._differs: Tensor | None = None  # [], bool: whether a shard was not what its copy says

    def get(self, shard: Tensor, *, position: int, make: Callable[[], Tensor]) -> Tensor:
        """The copy [ranks * shard], from ``make()`` if there is none or the weights have changed.

        Args:
            shard: What this rank holds by now, to compare a copy that is used again.
            position: This rank's place in the group that the copy was gathered from.
            make: Gathers.
        """
        if self._kept is None or self._version() != self._kept_version:
            self._kept, self._kept_version = make(), self._version()
        else:
            self._compare(shard, position)
        if self._kept.is_cuda:  # made on another stream perhaps, when a user gathers a module by hand
            self._kept.record_stream(torch.cuda.current_stream(self._kept.device))
        return self._kept

    def drop(self) -> None:
        """Forget the copy: the next use gathers."""
        self._kept = self._kept_version = None

    def take_differs(self) -> Tensor | None:
        """Whether a copy was used that was not what its shard held by then: [], or None if no copy was used again."""
        differs, self._differs = self._differs, None
        return differs

    def _compare(self, shard: Tensor, position: int) -> None:
        """Note, without waiting for the device, whether this rank's part of the copy still is its shard, bit by bit."""
        assert self._kept is not None
        own = self._kept.narrow(0, position * shard.numel(), shard.numel())
        differs = (own.view(torch.uint8) != shard.view(torch.uint8)).any()
        self._differs = differs if self._differs is None else self._differs | differs
