"""Streams and events with vector clocks: which operations are ordered before those that a stream enqueues next."""

from __future__ import annotations

from itertools import count
from typing import Any

Clock = dict[int, int]  # of each stream by number: how many of its operations are over


def merge(clock: Clock, other: Clock) -> None:
    """Add what ``other`` knows to ``clock``."""
    for stream, operations in other.items():
        if operations > clock.get(stream, 0):
            clock[stream] = operations


class Stream:
    """A stream of a simulated device.

    Attributes:
        number: Identity of the stream in clocks.
        seen: Operations that are over before the next one of this stream begins; its own are always among them.
        name: Name for reports.
    """

    _numbers = count(1)

    def __init__(self, device: Any = None, priority: int = 0, *, name: str = "") -> None:
        self.number = next(self._numbers)
        self.seen: Clock = {self.number: 0}
        self.name = name or f"stream {self.number}"

    @property
    def operations(self) -> int:
        """Number of operations that were enqueued on this stream."""
        return self.seen[self.number]

    def wait_stream(self, stream: Stream) -> None:
        merge(self.seen, stream.seen)

    def wait_event(self, event: Event) -> None:
        merge(self.seen, event.seen)

    def has_seen(self, stream: int, operations: int) -> bool:
        """Whether the first ``operations`` of ``stream`` are over before the next operation of this one begins."""
        return self.seen.get(stream, 0) >= operations


class Event:
    """A point of a stream, once it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: Clock = {}
