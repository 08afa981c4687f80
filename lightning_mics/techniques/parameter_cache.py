"""The cached parameters of one parameter group: which of them are valid, and whether they still equal their shards.

Where they are kept, and how they are gathered, is said in :mod:`~lightning_mics.techniques.once_per_step`. What drops
them is an event that every rank sees: see [Note: When cached weights are dropped].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import trainable, weights_version
from lightning_mics._torch.streams import current_stream, has_streams, keep_for_current_stream
from lightning_mics._torch.units.gather_inputs import gathered_segments


class ParameterCache:
    """The cached parameters of one parameter group: a block, or the root's own parameters.

    All ranks must come to the same decision, or their collectives would not match: see
    [Note: When cached weights are dropped].

    Args:
        version: Returns the version of each of the group's weights; it changes with every update that torch records.
        trains: Returns whether each of them requires gradients, so that it may change at a boundary unrecorded.
    """

    def __init__(
        self, version: Callable[[], Sequence[Hashable]], trains: Callable[[], Sequence[bool]] = lambda: ()
    ) -> None:
        self._version = version
        self._trains = trains
        self._cached_version: Sequence[Hashable] | None = None
        self._cached_trains: Sequence[bool] = ()
        self._only_frozen = False  # whether what trains was dropped
        self._updated: dict[int, Hashable] = {}  # versions of what was updated here as in the shards, by position
        self._differs: Tensor | None = None  # [], bool: whether a shard differed from its part of the cache
        self._compared: Any = None  # event after it was computed

    @property
    def usable(self) -> bool:
        """Whether all parameters are cached, and torch has recorded no change of the weights since."""
        if self._only_frozen:
            return not self.stale()
        return self._cached_version is not None and self._cached_version == self._version()

    def stale(self) -> list[int]:
        """Positions of the parameters, in the group, that are not cached or have changed since."""
        now = self._version()
        if self._cached_version is None:
            return list(range(len(now)))
        stale = {index for index, pair in enumerate(zip(self._cached_version, now, strict=True)) if pair[0] != pair[1]}
        if self._only_frozen:
            for trains in (self._cached_trains, self._trains()):
                stale.update(index for index, each in enumerate(trains) if each and index not in self._updated)
        return sorted(stale)

    def mark_valid(self) -> None:
        """Mark the cache as valid for the current version of the weights."""
        self._cached_version, self._cached_trains, self._only_frozen = self._version(), self._trains(), False
        self._updated = {}

    def equals_before(self, index: int) -> bool:
        """Whether the parameter at a position was cached and torch has recorded no change of it since.

        Args:
            index: Position of the parameter in the group.
        """
        return self._cached_version is not None and self._cached_version[index] == self._version()[index]

    def mark_updated(self, indices: Sequence[int]) -> None:
        """Mark parameters as valid although they train: what has changed the shards has changed the cache as well.

        Args:
            indices: Positions of the parameters in the group.
        """
        assert self._cached_version is not None
        now, cached = self._version(), list(self._cached_version)
        for index in indices:
            cached[index] = self._updated[index] = now[index]
        self._cached_version = tuple(cached)

    def drop(self) -> None:
        """Drop the cached parameters: the next use gathers them, into the same memory where there is some."""
        self._cached_version, self._updated = None, {}

    def drop_trained(self) -> None:
        """Drop those that require gradients: what changes them is not always recorded. Frozen ones stay."""
        self._only_frozen = True

    def free(self) -> None:
        """Drop the cached parameters, and free their memory."""
        self.drop()

    def tensors(self) -> list[Tensor]:
        """Memory that the cache has now, each [any]."""
        raise NotImplementedError

    def compare(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Record whether this rank's part of the cache still equals its shards; does not wait for a device.

        Comparisons on any stream add to the same flag, one after the other.

        Args:
            parts: This rank's part of each cached tensor, [shard], and the shard now, [shard].
        """
        device = parts[0][0].device
        if not has_streams(device):
            if not all(torch.equal(*pair) for pair in parts) and _bits_differ(parts):  # NaN is unequal to itself
                self._differs = torch.tensor(True)
            return
        differs, here = _bits_differ(parts), current_stream(device)
        if self._differs is not None:  # not in place: the first one may be of an evaluation in inference mode
            here.wait_event(self._compared)
            keep_for_current_stream(self._differs)
            differs = self._differs | differs
        self._differs, self._compared = differs, here.record_event()

    def take_differs(self) -> Tensor | None:
        """Return whether the cache was used after its shard had changed, [], and reset it; None if it never was.

        The flag is ready on the current stream.
        """
        differs, self._differs = self._differs, None
        if differs is not None and has_streams(differs.device):
            current_stream(differs.device).wait_event(self._compared)
            keep_for_current_stream(differs)  # it is dropped once it has been read there
        return differs


class NodeSlice(ParameterCache):
    """A cache of which each node holds one copy, spread over its ranks: this rank's slice, of as many shards as nodes.

    Args:
        module: FSDP module of the parameter group.
    """

    def __init__(self, module: FSDPModule) -> None:
        super().__init__(lambda: weights_version(module), lambda: trainable(module))
        self._module = module

    @property
    def _kept(self) -> Tensor | None:
        """Memory of the slice from one use to the next: [nodes * shard]."""
        raise NotImplementedError

    @property
    def gathered(self) -> Literal["all", "some", "none"]:
        """How many of the parameters the next call gathers between nodes, before all are gathered in the node."""
        if self._kept is None or self._cached_version is None:
            return "all"
        if self.usable:
            return "none"
        return "some" if len(self.stale()) < len(self._cached_version) else "all"

    def _stale_parts(self, shard: Tensor, *, nodes: int) -> list[tuple[int, int]]:
        """Where in ``shard``, [shard], the parameters are that must be gathered between nodes: begins and ends."""
        if self.gathered == "none":
            return []
        cached = self._kept
        whole = [(0, shard.numel())]
        if self.gathered == "all" or cached is None or cached.numel() != nodes * shard.numel():
            return whole
        if cached.dtype != shard.dtype:
            return whole
        segments = gathered_segments(self._module, shard)
        return whole if segments is None else joined([segments[index] for index in self.stale()])

    @staticmethod
    def _fill(kept: Tensor, gathered: Tensor, parts: Sequence[tuple[int, int]], *, nodes: int) -> None:
        """Copy gathered parts of shards, [nodes * parts], into the slice, [nodes * shard]."""
        rows, new, at = kept.view(nodes, -1), gathered.view(nodes, -1), 0
        for begin, end in parts:
            rows[:, begin:end].copy_(new[:, at : at + end - begin])
            at += end - begin

    def tensors(self) -> list[Tensor]:
        """Memory of the slice, [nodes * shard], once there is some: of the device, or of the host."""
        return [] if self._kept is None else [self._kept]


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element in bytes


@torch.no_grad()
def _bits_differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether the tensors of any pair differ in any bit: [], bool. NaN equals itself.

    The number of operations does not grow with the number of pairs.

    Args:
        pairs: Flat tensors, each two of the same size and dtype: [any].
    """
    bits = BITS.get(min(one.element_size() for one, _ in pairs), torch.int64)
    ones, others = zip(*((one.view(bits), other.view(bits)) for one, other in pairs), strict=True)
    one, other = ones[0], others[0]
    if len(pairs) > 1:
        sizes = [each.numel() for each in ones]
        one, other = one.new_empty(2, sum(sizes))
        torch._foreach_copy_([*one.split(sizes), *other.split(sizes)], [*ones, *others])
    differs: Tensor = (one != other).any()
    return differs


def joined(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same segments, in order, with neighbors as one; empty ones are left out."""
    joined: list[tuple[int, int]] = []
    for begin, end in segments:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        elif begin < end:
            joined.append((begin, end))
    return joined


def between(segments: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What is between segments of a tensor.

    Args:
        segments: Begins and ends, in order.
        size: Number of elements of the tensor.
    """
    begins, ends = [0, *(end for _, end in segments)], [*(begin for begin, _ in segments), size]
    return list(zip(begins, ends, strict=True))
