"""Saved tensors of a forward in host memory, until its backward needs them.

A tensor is copied to the host when it is saved, on a stream of its own, and its memory on the device is free when that
copy has ended and nobody else holds it. In backward each is fetched while the one that was saved after it is in use, on
a further stream, so at most two of them are on the device. On a CPU the copies are copies in the same memory: nothing
is saved, and values and order are those of a device.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks

from lightning_mics._torch.streams import SideStream, current_stream, has_streams, keep_for_current_stream

USABLE_SHARE = 0.75  # of the host's memory: the rest is for the program, data and the page cache

_being_allocated = False  # on the host


class HostMemoryError(RuntimeError):
    """What was moved to the host does not fit its memory."""

    comes_again = True  # if the job is started again: see `in_memory.launcher`


class SavedOnHost:
    """The tensors that a model saves on the host in one micro-step.

    Args:
        limit_bytes: Host memory of this rank for them; None is no limit.
        what: Option and tensors, for the error.
    """

    def __init__(self, *, limit_bytes: int | None = None, what: str = "saved tensors") -> None:
        self._limit_bytes = limit_bytes
        self._what = what
        self._to_host, self._from_host = SideStream(), SideStream()
        self._size_bytes = 0
        self._last: weakref.ref[_OnHost] | None = None

    @contextmanager
    def saving(self, tensors: Iterable[Any]) -> Iterator[None]:
        """A context in which those of ``tensors`` that are saved for backward go to the host.

        Args:
            tensors: Values, of which tensors that require gradients go to the host; others are shared by many uses.

        Raises:
            RuntimeError: If one of them is changed in place inside: autograd finds that out for what it saves itself,
                and the copy to the host may run at any time.
        """
        given = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]
        moved, versions = {_storage(tensor) for tensor in given}, [tensor._version for tensor in given]

        def pack(tensor: Tensor) -> Tensor | _OnHost:
            return self._move(tensor) if _storage(tensor) in moved else tensor

        with saved_tensors_hooks(pack, _unpack):
            yield
        if versions != [tensor._version for tensor in given]:
            raise RuntimeError(
                f"{self._what} are copied while the block runs, and a block changes its input in place; have it work "
                "on a copy, as `hidden = hidden * 2` for `hidden.mul_(2)`"
            )

    def _move(self, tensor: Tensor) -> _OnHost:
        size_bytes = self._size_bytes + tensor.nbytes
        if self._limit_bytes is not None and size_bytes > self._limit_bytes and not is_fake(tensor):
            raise HostMemoryError(
                f"{self._what} take more than {self._limit_bytes / 2**30:.3g} GiB of host memory per rank, its part of "
                f"{USABLE_SHARE:.0%} of what this host has; use a smaller micro-batch, or leave the option out"
            )
        moved = _OnHost(tensor, to_host=self._to_host, from_host=self._from_host, before=self._last)
        self._size_bytes = size_bytes
        weakref.finalize(moved, self._release, tensor.nbytes)
        self._last = weakref.ref(moved)
        return moved

    def _release(self, size_bytes: int) -> None:
        self._size_bytes -= size_bytes


class _OnHost:
    """A tensor on the host, and on its way back.

    Args:
        tensor: Tensor on the device: [any].
        to_host: Stream of copies to the host.
        from_host: Stream of copies to the device.
        before: Tensor that was saved before this one, which backward needs after it.
    """

    def __init__(
        self, tensor: Tensor, *, to_host: SideStream, from_host: SideStream, before: weakref.ref[_OnHost] | None
    ) -> None:
        self._device = tensor.device
        self._from_host = from_host
        self._before = before
        self._fetched: tuple[Tensor, Any] | None = None
        with to_host.after(current_stream(self._device), self._device):
            with on_host():
                self._values = torch.empty_like(tensor, device="cpu", pin_memory=has_streams(self._device))
            self._values.copy_(tensor, non_blocking=True)
            keep_for_current_stream(tensor)
        self._arrived = to_host.record()

    def fetch(self) -> None:
        """Begin the copy to the device, after what the current stream has now."""
        if self._fetched is None:
            with self._from_host.after(current_stream(self._device), self._device):
                current_stream(self._device).wait_event(self._arrived)
                values = torch.empty_like(self._values, device=self._device)
                values.copy_(self._values, non_blocking=True)
            self._fetched = (values, self._from_host.record())

    def take(self) -> Tensor:
        """The tensor on the device, for the current stream; the one that was saved before it is fetched meanwhile."""
        self.fetch()
        assert self._fetched is not None
        (values, arrived), self._fetched = self._fetched, None
        current_stream(self._device).wait_event(arrived)
        keep_for_current_stream(values)
        before = self._before() if self._before else None
        if before is not None:
            before.fetch()
        return values


def _unpack(saved: Tensor | _OnHost) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.take()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def on_host() -> Iterator[None]:
    """A context in which all tensors are allocated in host memory; for those who count the memory of a device."""
    global _being_allocated
    before, _being_allocated = _being_allocated, True
    try:
        yield
    finally:
        _being_allocated = before


def is_allocating_on_host() -> bool:
    """Whether the tensor that is being allocated is in host memory: see :func:`on_host`."""
    return _being_allocated


def host_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or less where a control group limits it.

    Args:
        cgroups: Folder in which the system mounts control groups.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits(cgroups)])


def _cgroup_limits(cgroups: Path) -> Iterator[int]:
    """Limits of the control groups of this process, of version 1 and 2, in bytes."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        folder = root / group.lstrip("/")
        for each in (folder, *folder.parents):  # a container may see its own group as the root
            if each.is_relative_to(root):
                try:
                    limit = (each / name).read_text().strip()
                except OSError:
                    continue
                if limit.isdigit():
                    yield int(limit)


def pin(memory: Tensor, device: torch.device) -> None:
    """Let a device copy to host memory that was not allocated by torch, without waiting, if its runtime can do that.

    Args:
        memory: Host memory: [bytes].
        device: Device that copies.

    Raises:
        RuntimeError: If the runtime refuses; its limit is that of locked memory.
    """
    runtime = _runtime_of(device)
    if runtime is not None:
        runtime.check_error(runtime.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))


def unpin(memory: Tensor, device: torch.device) -> None:
    """Undo :func:`pin`, before the memory is given back.

    Args:
        memory: Host memory: [bytes].
        device: Device that copied.
    """
    runtime = _runtime_of(device)
    if runtime is not None:
        runtime.check_error(runtime.cudart().cudaHostUnregister(memory.data_ptr()))


def _runtime_of(device: torch.device) -> Any:
    """The module of a device whose runtime registers host memory; None for others, such as a CPU."""
    module = torch.get_device_module(device) if has_streams(device) else None
    return module if hasattr(module, "cudart") else None
