"""Beyond the paper: caches and sums of nodes that wait in host memory between uses.

A node's cache takes M/k bytes of each rank, with M bytes of parameters and k ranks of a partition group on the node,
and its sum of gradients as much. Here they are in host memory, pinned where the device has streams, and pass through
the device one unit at a time. A slice of the cache comes back while the unit before it is gathered; a sum comes back
while the one before it is added to, and goes to the host again. For units 1, 2, 3 of a backward::

    from the host    slice 2, sum 1     slice 3, sum 2     sum 3
    gather           unit 1             unit 2             unit 3
    reduce                              unit 1             unit 2             unit 3
    to the host                                            sum 1              sum 2              sum 3

Which unit comes next is what :mod:`~lightning_mics.techniques.micro_step_order` expects; what it does not expect is
copied when it is needed. Nothing is sent for this, so the ranks need not agree on it.

At most two slices, and two sums, are on the device: memory for a further one is that of the oldest, once it was used
and has arrived on the host. The device waits for that, the host does not, however far it runs ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mics._torch.host_memory import on_host
from lightning_mics._torch.streams import SideStream, current_stream, has_streams, keep_for_current_stream

AT_ONCE = 2  # tensors of one kind on the device


@dataclass(eq=False)
class _Passing:
    """Memory of the device that values pass through.

    Attributes:
        values: The memory: [any].
        over: Events after its last use; None while it is in use.
    """

    values: Tensor
    over: Sequence[Any] | None = None


class HostCopies:
    """The streams on which values of one kind travel to the host and back, and the device memory they pass through.

    That memory belongs to a stream on which nothing runs, so that it is free for the next values as soon as that stream
    has waited for its last use.
    """

    def __init__(self) -> None:
        self.to_host, self.from_host, self._owner = SideStream(), SideStream(), SideStream()
        self.fetched: dict[HeldOnHost, None] = {}  # ahead of their use
        self._passing: list[_Passing] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the device for the current stream, which waits for the oldest values if there are two: [size].

        Args:
            size: Number of elements of each dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        with self._owner.entered(device):
            if len(self._passing) >= AT_ONCE:
                self._free_oldest(device)
            with torch.inference_mode(False):  # what an evaluation fetches may be changed in training
                values = torch.empty(size, dtype=dtype, device=device)
        current_stream(device).wait_event(self._owner.record())
        self._passing.append(_Passing(values))
        return values

    def leave(self, values: Tensor, over: Sequence[Any]) -> None:
        """End the use of memory; memory that is not from :meth:`allocate` is kept for the stream to the host.

        Args:
            values: The memory: [any].
            over: Events after its last use.
        """
        for passing in self._passing:
            if passing.values is values:
                passing.over = over
                return
        with self.to_host.entered(values.device):
            keep_for_current_stream(values)

    def release(self) -> None:
        """Free all memory of the device, when nothing more is expected."""
        for held in list(self.fetched):
            held.discard()
        if not self._passing:
            return
        device = self._passing[0].values.device
        here = current_stream(device)
        with self._owner.entered(device):
            for passing in self._passing:
                if passing.over is None:  # whoever used it was interrupted
                    for stream in (here, self.to_host.of_device(device), self.from_host.of_device(device)):
                        current_stream(device).wait_stream(stream)
                for event in passing.over or ():
                    current_stream(device).wait_event(event)
        self._passing.clear()

    def _free_oldest(self, device: torch.device) -> None:
        for index, passing in enumerate(self._passing):
            if passing.over is not None:
                for event in passing.over:
                    current_stream(device).wait_event(event)
                del self._passing[index]
                return


class HeldOnHost:
    """Values of one unit that wait on the host.

    Args:
        copies: Streams and device memory, which all units share.

    Attributes:
        values: The values on the host, [any], pinned where the device has streams; None before there are some.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.values: Tensor | None = None
        self._copies = copies
        self._device = torch.device("cpu")
        self._stored: Any = None  # event after the copy to the host
        self._read: Any = None  # event after the last copy from it
        self._fetched: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the device for new values: [size]; see :meth:`HostCopies.allocate`.

        Args:
            size: Number of elements of each dim.
            dtype: Dtype of the elements.
            device: The device of this rank.
        """
        self.discard()
        return self._copies.allocate(size, dtype=dtype, device=device)

    def put(self, values: Tensor) -> None:
        """Copy ``values``, [any], to the host, after what the current stream has now."""
        self.discard()
        self._device = device = values.device
        if self.values is None or (self.values.shape, self.values.dtype) != (values.shape, values.dtype):
            with on_host(), torch.inference_mode(False):
                self.values = torch.empty(
                    values.shape, dtype=values.dtype, device="cpu", pin_memory=has_streams(device)
                )
        with self._copies.to_host.after(current_stream(device), device):
            if self._read is not None:
                current_stream(device).wait_event(self._read)
            self.values.copy_(values, non_blocking=True)
        self._stored = self._copies.to_host.record()

    def fetch(self) -> None:
        """Begin the copy to the device, unless it has begun."""
        if self._fetched is not None:
            return
        assert self.values is not None
        size, dtype, device = self.values.shape, self.values.dtype, self._device
        with self._copies.from_host.entered(device):
            self._fetched = self._copies.allocate(size, dtype=dtype, device=device)
            current_stream(device).wait_event(self._stored)
            self._fetched.copy_(self.values, non_blocking=True)
        self._read = self._copies.from_host.record()
        self._copies.fetched[self] = None

    def take(self) -> Tensor:
        """The values on the device, [any], for the current stream; :meth:`leave` ends their use."""
        self.fetch()
        values, self._fetched = self._fetched, None
        assert values is not None
        self._copies.fetched.pop(self, None)
        current_stream(self._device).wait_event(self._read)
        return values

    def leave(self, values: Tensor) -> None:
        """End the use of ``values``, [any], on the device, by what the current stream has now, and the copy from it."""
        over = [current_stream(values.device).record_event()]
        self._copies.leave(values, over if self._stored is None else [*over, self._stored])

    def discard(self) -> None:
        """Discard values that were fetched and are not needed."""
        values, self._fetched = self._fetched, None
        self._copies.fetched.pop(self, None)
        if values is not None:
            self._copies.leave(values, [self._read])

    def drop(self) -> None:
        """Free the memory of the values; what the current stream does next comes after copies that are on their way."""
        self.discard()
        if self.values is not None:
            for event in (self._stored, self._read):
                if event is not None:
                    current_stream(self._device).wait_event(event)
        self.values = self._stored = self._read = None
