"""Buffers that ranks change from their own samples: those of rank 0 where they are used or saved, as under DDP.

Running statistics, queues, codebooks: each rank would have its own. As DDP with ``broadcast_buffers=True`` does, the
first forward of an accumulation window begins with rank 0's buffers. Before an evaluation and before a checkpoint is
saved all are made equal as well, so that what is evaluated is what is saved, and a resumed run goes on from it.

Most buffers never differ: masks, frequencies, power iterations. Only those that did are broadcast in a window. Which
they are is found where ranks compare checksums of all buffers: before an evaluation, before a checkpoint, and after the
last forward of windows 1, 3, 5, 9, 17 and so on. All ranks do so, whether or not their own buffers have changed. The
comparisons after window 1 take two more windows, so that the host waits neither for the device nor for other ranks.
Where steps are saved in memory, they go on at each save as well, beside the training. A model without buffers has no
part in this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics._torch.fsdp import is_fake
from lightning_mics._torch.streams import HostCopy
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.sharding.ranks.replicas import checksum

TECHNIQUE = "broadcast of buffers"


class BufferBroadcast:
    """Keeps the buffers of a sharded model equal to those of rank 0.

    Args:
        root: The sharded model.
        group: Process group of all ranks; None keeps each rank's own buffers.
        control: Control plane of all ranks.
        at_boundary: Returns whether a forward that runs now is a gradient accumulation boundary's.
    """

    def __init__(
        self, root: nn.Module, *, group: CountedGroup | None, control: ControlPlane, at_boundary: Callable[[], bool]
    ) -> None:
        self._root = root
        self._group = group
        self._control = control
        self._at_boundary = at_boundary
        self._differing: set[str] = set()  # names of buffers that have differed
        self._forwards = 0  # of the root, that are running now: a forward may call itself
        self._handled: BaseException | None = None  # exception that was being handled before the forward
        self._windows = 0  # whose last forward has run
        self._next_comparison = 1  # window at whose end a comparison of all buffers begins
        self._comparison: Iterator[None] = iter(())  # goes on at the end of each window
        self._begins_window = False
        self._trained = self._may_differ = False  # since buffers were made equal: by a training forward, by any
        if group is not None and self._buffers():
            root.register_forward_pre_hook(self._before_forward)
            root.register_forward_hook(self._after_forward, always_call=True)

    _DONE = object()

    def make_equal(self) -> None:
        """Give all ranks the buffers of rank 0 if a forward has run since the last time; every rank calls it."""
        if self._may_differ:
            self._finish_comparison()  # of an earlier window
            self._comparison = self._compare()
            self._finish_comparison()
            self._broadcast()
            self._may_differ = self._trained = self._begins_window = False

    def compare_beside(self) -> None:
        """Go on with a comparison of all ranks' buffers, without waiting for it; every rank calls it at a boundary.

        The next forward begins with rank 0's values of those that are known to differ.
        """
        if self._may_differ and next(self._comparison, self._DONE) is self._DONE:
            self._comparison = self._compare()
            next(self._comparison, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, _module: nn.Module, _inputs: Any) -> None:
        self._forwards += 1
        if self._forwards > 1:
            return
        self._handled = sys.exc_info()[1]
        if not torch.is_grad_enabled():
            if self._trained:
                self.make_equal()
            return
        if self._begins_window:
            self._broadcast()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._forwards = max(0, self._forwards - 1)
        if self._forwards:
            return
        self._may_differ = True
        failed = sys.exc_info()[1] is not self._handled  # this hook runs after exceptions as well
        if torch.is_grad_enabled() and not failed:
            self._trained = True
            self._begins_window = self._at_boundary()
            if self._begins_window:
                self._end_window()

    def _end_window(self) -> None:
        """Compare after some windows. The broadcast waits for the next: a backward may still need the buffers."""
        self._windows += 1
        next(self._comparison, None)
        if self._windows == self._next_comparison:
            self._next_comparison = max(3, 2 * self._next_comparison - 1)
            self._comparison = self._compare()
            next(self._comparison, None)
        if self._windows == 1:  # most buffers that ever differ do so by now
            self._finish_comparison()

    def _finish_comparison(self) -> None:
        for _ in self._comparison:
            pass

    def _buffers(self) -> dict[str, Tensor]:
        buffers = dict(self._root.named_buffers())
        kind = next(map(_kind_of_device, (*self._root.parameters(), *buffers.values())), None)
        return {name: buffer for name, buffer in buffers.items() if buffer.device.type == kind}

    def _compare(self) -> Iterator[None]:
        """Find the buffers that differ, in three parts; each waits for what the one before has begun."""
        buffers = self._buffers()
        sums = torch.stack([checksum(buffer) for buffer in buffers.values()])  # [buffers]
        if is_fake(sums):  # a rehearsal has no values
            return
        copy = HostCopy(torch.stack([sums, ~sums]))  # the complement orders the other way
        yield
        copy.wait()
        all_compared = self._control.begin_largest(copy.values, "compares buffers")
        yield
        largest = all_compared()
        equal = (largest[0] == ~largest[1]).tolist()
        self._differing |= {name for name, same in zip(buffers, equal, strict=True) if not same}

    @torch.no_grad()
    def _broadcast(self) -> None:
        """Broadcast the buffers that have differed, together; does not wait for the device."""
        if not self._differing:
            return
        buffers = [buffer for name, buffer in self._buffers().items() if name in self._differing]
        buffers.sort(key=lambda buffer: -buffer.itemsize)  # so that each begins at a multiple of its item size
        sent = torch.cat([buffer.contiguous().view(-1).view(torch.uint8) for buffer in buffers])
        assert self._group is not None
        self._control.agree("broadcasts buffers")
        self._group.broadcast(sent, technique=TECHNIQUE)
        parts = torch.split(sent, [buffer.nbytes for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.data.copy_(part.view(buffer.dtype).view(buffer.shape))  # not counted by autograd, as in one process


def _kind_of_device(tensor: Tensor) -> str:
    """Where a model computes with a tensor: a sharded one may be in host memory."""
    return str(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device.type
