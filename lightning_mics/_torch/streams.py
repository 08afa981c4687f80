"""Streams of a device: the one place that takes them from torch.

On a CPU torch's streams are empty objects, so callers need no case of their own for it. What they ask is
:func:`has_streams`: whether work that is enqueued now runs later, beside other streams.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HIGH_PRIORITY = -1  # what FSDP2 gives its streams of communication
WITHOUT_STREAMS = frozenset({"cpu", "meta"})  # types of devices


def has_streams(device: torch.device) -> bool:
    """Whether operations on ``device`` are enqueued on streams, and run after the call has returned."""
    return device.type not in WITHOUT_STREAMS


def current_stream(device: torch.device) -> Any:
    """The stream that operations on ``device`` are enqueued on now."""
    return torch.get_device_module(device).current_stream(device)


def new_stream(device: torch.device) -> Any:
    """A new stream for communication on ``device``, the current one of its type."""
    return torch.get_device_module(device).Stream(priority=HIGH_PRIORITY)


def on_stream(stream: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Enqueue the operations inside on a stream.

    Args:
        stream: Stream of ``device``.
        device: The device of this rank.
    """
    context: AbstractContextManager[Any] = torch.get_device_module(device).stream(stream)
    return context


def keep_for_current_stream(tensor: Tensor) -> None:
    """Have the memory of ``tensor``, [any], reused after the current stream's work only, whenever it is freed.

    Memory belongs to the stream that was current when it was allocated. Freed while another stream still reads it, it
    would be handed out again to work that does not wait for that stream.
    """
    if has_streams(tensor.device):
        tensor.record_stream(current_stream(tensor.device))


class SideStream:
    """A stream that communication is enqueued on beside the streams that need its result.

    It is made at its first use: before the first forward of a model torch may not know the device of this rank.
    """

    def __init__(self) -> None:
        self._stream: Any = None

    def after(self, stream: Any, device: torch.device) -> AbstractContextManager[Any]:
        """Enqueue the operations inside on this stream, after those that ``stream`` has now.

        Args:
            stream: Stream of ``device``.
            device: The device of this rank.
        """
        own = self.of_device(device)
        own.wait_stream(stream)
        return on_stream(own, device)

    def entered(self, device: torch.device) -> AbstractContextManager[Any]:
        """Enqueue the operations inside on this stream, after what it waits for already.

        Args:
            device: The device of this rank.
        """
        return on_stream(self.of_device(device), device)

    def of_device(self, device: torch.device) -> Any:
        """The stream itself, of ``device``."""
        if self._stream is None:
            self._stream = new_stream(device)
        return self._stream

    def record(self) -> Any:
        """An event after what this stream has now, for other streams to wait for."""
        return self._stream.record_event()

    def work(self, device: torch.device) -> dist.Work:
        """What this stream has now, as the work of an asynchronous collective.

        Args:
            device: The device of this rank.
        """
        return _EnqueuedWork(self.record(), device)


class HostCopy:
    """Values of a device on their way to the host, copied in the order of the current stream.

    Args:
        values: Tensor on any device: [any].

    Attributes:
        values: The copy on the CPU, [any], to be read once it has arrived.
    """

    def __init__(self, values: Tensor) -> None:
        device = values.device
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=has_streams(device))
        self.values.copy_(values, non_blocking=True)
        self._event = torch.get_device_module(device).Event()
        self._event.record()

    @property
    def has_arrived(self) -> bool:
        """Whether the values are on the host."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Wait until the values are on the host."""
        self._event.synchronize()


class _EnqueuedWork(dist.Work):
    def __init__(self, done: Any, device: torch.device) -> None:
        super().__init__()
        self._done, self._device = done, device

    def wait(self, timeout: Any = None) -> bool:
        """Have the current stream wait; the host does not."""
        current_stream(self._device).wait_event(self._done)
        return True
