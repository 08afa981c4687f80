"""Simulated streams in place of torch's for CPU tensors, and a look at every operation that runs on them.

FSDP2 and this package take streams and events from the module of the tensors' device, ``torch.cpu`` for CPU tensors,
where they are empty objects. Inside :func:`simulated_streams` they are those of a simulation. A collective that runs
asynchronously goes to a stream of its process group, as those of NCCL do.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.profiler import record_function
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from lightning_mics._torch import streams as package_streams
from lightning_mics._torch.collective_operations import group_of
from lightning_mics._torch.fake import TorchDispatchMode
from tests.support.stream_order import memory, streams
from tests.support.stream_order.memory import Memory, Place, tensors_in
from tests.support.stream_order.streams import Clock, merge

WAITS = {  # operations with a result that the host needs
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "c10d.barrier",
}
WITHOUT_ACCESS = {"aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided"}
CONTROL = "mics control plane"  # the process groups of the control plane, on gloo
COUNT_AS_PACKAGE: set[str] = set()  # further files, whose functions stand in for some of the package
OUTPUT_FIRST = {"c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.alltoall_base_"}


@dataclass(frozen=True)
class Problem:
    """Two operations in no order, or one that the host waits in.

    Attributes:
        kind: What is wrong, and on which streams.
        first: Place of the operation that may not be over; empty for a wait.
        then: Place of the operation that should wait for it.
    """

    kind: str
    first: str
    then: str

    def __str__(self) -> str:
        return f"{self.kind}\n    {self.first}\n    {self.then}"


class Simulation:
    """What a program has enqueued on the streams of a simulated device, and what is wrong with it.

    Attributes:
        current: Current stream.
        problems: Operations in no order, and memory reused too early, with how often each was seen.
        waits: Waits of the host for what the current window has enqueued, by place, with how often each was seen.
        collectives: Collectives by group, without those of the control plane, which is on the host.
        launches: Operations on tensors by owner ("package", "fsdp" or "user") and name.
    """

    def __init__(self) -> None:
        self.default_stream = self.current = _DeviceStream(self, name="the default stream")
        self.host: Clock = {}
        self.problems: Counter[Problem] = Counter()
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.memory = Memory(self._report, self.default_stream)
        self._streams: list[streams.Stream] = [self.default_stream]
        self._of_groups: dict[Any, streams.Stream] = {}
        self._works: dict[int, tuple[Any, streams.Event, list[Tensor]]] = {}  # by identity of the work
        self._results: dict[int, streams.Event] = {}  # of functional collectives, by address of the storage
        self._before_this_window: Clock = {}

    def new_stream(self, device: Any = None, priority: int = 0) -> streams.Stream:
        stream = _DeviceStream(self, name=f"the stream of {_in_words(_place()[1])}")
        self._streams.append(stream)
        return stream

    @contextmanager
    def on(self, stream: streams.Stream | None) -> Iterator[Any]:
        """Enqueue what runs inside on ``stream``."""
        before, self.current = self.current, stream or self.current
        try:
            yield stream
        finally:
            self.current = before

    def wait_on_host(self, clock: Clock | None = None) -> None:
        """Let the host wait: for ``clock``, or for all that was enqueued."""
        owner, place = _place()
        if clock is None or any(n > self._before_this_window.get(stream, 0) for stream, n in clock.items()):
            self.waits[f"{owner}: {_in_words(place)}"] += 1
        for stream in self._streams if clock is None else ():
            merge(self.host, stream.seen)
        merge(self.host, clock or {})

    def begin_window(self) -> None:
        """Begin a window: from now on the device has work while the host waits for what was enqueued before."""
        self._before_this_window = {}
        for stream in self._streams:
            merge(self._before_this_window, stream.seen)

    # -- operations ----------------------------------------------------------------------------------------------------

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation as one that was enqueued on the current stream, or on that of its process group."""
        group = group_of(operation, args)
        if group is not None and group.group_desc == CONTROL:
            return self._run_on_host(operation, args, kwargs)
        if group is not None:
            self.collectives["the default group" if group is dist.group.WORLD else group.group_desc] += 1
        if kwargs.get("pin_memory"):  # memory of the host; here there may be no device to pin it for
            result = operation(*args, **{**kwargs, "pin_memory": False})
            self.memory.block_of(result).on_host = True
            return result
        if operation.namespace == "_c10d_functional":
            return self._run_functional(operation, args, kwargs)
        if group is not None and _is_asynchronous(operation, args, kwargs):
            stream = self._of_group(operation, args)
            stream.wait_stream(self.current)
            with self.on(stream):
                result = self._enqueue(operation, args, kwargs)
            self._note_work(result, stream, tensors_in(args))
            return result
        return self._enqueue(operation, args, kwargs)

    def _run_on_host(self, operation: Any, args: Any, kwargs: Any) -> Any:
        for tensor in tensors_in(args):
            self.memory.block_of(tensor).on_host = True
        return operation(*args, **kwargs)

    def _run_functional(self, operation: Any, args: Any, kwargs: Any) -> Any:
        if "wait_tensor" in str(operation):
            event = self._results.pop(args[0].untyped_storage()._cdata, None)
            if event is not None:
                self.current.wait_event(event)
            return operation(*args, **kwargs)
        if group_of(operation, args) is None:  # it only wraps a tensor
            return operation(*args, **kwargs)
        stream, allocated_on = self._of_group(operation, args), self.current
        stream.wait_stream(self.current)
        with self.on(stream):
            result = self._enqueue(operation, args, kwargs, allocated_on=allocated_on)
        for tensor in tensors_in(result):
            self._results[tensor.untyped_storage()._cdata] = _recorded(stream)
        return result

    def _enqueue(self, operation: Any, args: Any, kwargs: Any, *, allocated_on: streams.Stream | None = None) -> Any:
        stream, (owner, place) = self.current, _place()
        name = _name(operation)
        merge(stream.seen, self.host)
        stream.seen[stream.number] += 1
        reads, writes = _accesses(operation, name, args, kwargs)
        if (reads or writes) and all(self.memory.block_of(tensor).on_host for tensor in (*reads, *writes)):
            result = operation(*args, **kwargs)
            for tensor in tensors_in(result):
                self.memory.block_of(tensor).on_host = True
            return result
        if reads or writes:
            self.launches[owner, name] += 1
        for tensor in reads:
            self.memory.use(tensor, stream, writes=False, place=place)
        for tensor in writes:
            self.memory.use(tensor, stream, writes=True, place=place)
        if name in WAITS:
            self.wait_on_host(stream.seen)
        known = {tensor.untyped_storage()._cdata for tensor in (*reads, *writes)}
        result = operation(*args, **kwargs)
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and not self.memory.knows(tensor):
                self.memory.allocate(storage, allocated_on or stream, place=place)
                if allocated_on is not None or name not in WITHOUT_ACCESS:
                    self.launches[owner, name] += not (reads or writes)
                    self.memory.use(tensor, stream, writes=True, place=place)
        return result

    def _of_group(self, operation: Any, args: Any) -> streams.Stream:
        group = group_of(operation, args)
        if group not in self._of_groups:
            self._of_groups[group] = streams.Stream(name=f"NCCL's stream of {group.group_desc if group else 'a group'}")
            self._streams.append(self._of_groups[group])
        return self._of_groups[group]

    # -- what stands in for torch's ------------------------------------------------------------------------------------

    def _note_work(self, result: Any, stream: streams.Stream, tensors: list[Tensor]) -> None:
        boxed = (
            next(each for each in result if isinstance(each, torch.ScriptObject))
            if isinstance(result, tuple)
            else result
        )
        work = dist.Work.unbox(boxed)
        self._works[id(work)] = (work, _recorded(stream), tensors)  # NCCL holds the tensors until somebody waits

    def wait_for_work(self, wait: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
        done = wait(work, *args, **kwargs)
        _, event, _ = self._works.pop(id(work), (None, None, None))
        if event is not None:
            self.current.wait_event(event)
        return done

    def resize(self, resize: Any, storage: Any, size: int) -> Any:
        place = _place()[1]
        self.memory.free(storage)
        result = resize(storage, size)
        if size:
            self.memory.allocate(storage, self.current, place=place)
        return result

    def record_stream(self, tensor: Tensor, stream: streams.Stream) -> None:
        self.memory.block_of(tensor).recorded.add(stream)

    def _report(self, kind: str, first: Place, then: Place) -> None:
        self.problems[Problem(kind, _in_words(first), _in_words(then))] += 1


class _DeviceStream(streams.Stream):
    """A stream as programs see it."""

    def __init__(self, simulation: Simulation, *, name: str) -> None:
        super().__init__(name=name)
        self._simulation = simulation

    def record_event(self, event: Any = None) -> Any:
        event = event or _DeviceEvent(self._simulation)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._simulation.wait_on_host(self.seen)

    def query(self) -> bool:
        merge(self._simulation.host, self.seen)  # what may be over
        return True


class _DeviceEvent(streams.Event):
    """An event as programs see it."""

    def __init__(self, simulation: Simulation, *_: Any, **__: Any) -> None:
        super().__init__()
        self._simulation = simulation

    def record(self, stream: streams.Stream | None = None) -> None:
        self.seen = dict((stream or self._simulation.current).seen)

    def wait(self, stream: streams.Stream | None = None) -> None:
        (stream or self._simulation.current).wait_event(self)

    def synchronize(self) -> None:
        self._simulation.wait_on_host(self.seen)

    def query(self) -> bool:
        merge(self._simulation.host, self.seen)  # what may be over
        return True


def _recorded(stream: streams.Stream) -> streams.Event:
    event = streams.Event()
    event.seen = dict(stream.seen)
    return event


class _Watch(TorchDispatchMode):
    """Shows every operation on tensors of the simulated device to the simulation."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(issubclass(each, (DTensor, AsyncCollectiveTensor)) for each in types):
            return NotImplemented  # operations on what is inside come
        kwargs = kwargs or {}
        if operation.is_view:  # launches nothing
            return operation(*args, **kwargs)
        given = tensors_in(args)
        if kwargs:
            given += tensors_in(list(kwargs.values()))
        for tensor in given:
            if isinstance(tensor, FakeTensor) or not tensor.is_cpu:
                return operation(*args, **kwargs)
        return self._simulation.run(operation, args, kwargs)


@contextmanager
def simulated_streams() -> Iterator[Simulation]:
    """Simulate the streams of a device on CPU tensors."""
    simulation = Simulation()
    resize = torch.UntypedStorage.resize_
    of_device = {
        "Stream": simulation.new_stream,
        "Event": partial(_DeviceEvent, simulation),
        "stream": simulation.on,
        "current_stream": lambda device=None: simulation.current,
        "synchronize": lambda device=None: simulation.wait_on_host(),
    }
    in_place = [(torch.cpu, name, value) for name, value in of_device.items()]
    in_place += [(torch.accelerator, name, of_device[name]) for name in ("current_stream", "synchronize")]
    in_place += [(torch.cuda, "synchronize", of_device["synchronize"])]
    in_place += [(package_streams, "WITHOUT_STREAMS", frozenset({"meta"}))]
    in_place += [
        (torch.UntypedStorage, "resize_", lambda storage, size: simulation.resize(resize, storage, size)),
        (torch.Tensor, "record_stream", lambda tensor, stream: simulation.record_stream(tensor, stream)),
    ]
    in_place += [(kind, "wait", _waiting_for_work(simulation, kind.wait)) for kind in (dist.Work, FakeWork)]
    in_place += [(torch.Tensor, name, _waiting(simulation, name)) for name in ("cpu", "numpy", "tolist")]
    in_place += [(record_function, name, _nothing_to_record) for name in ("__enter__", "__exit__")]
    with _replaced(in_place), _Watch(simulation):
        yield simulation


def _nothing_to_record(record: record_function, *_: Any) -> record_function | None:
    """Stand in for the ends of a profiler's range: FSDP2 opens thousands, each of them two operations."""
    return None if _ else record


def _waiting_for_work(simulation: Simulation, wait: Callable[..., Any]) -> Callable[..., Any]:
    return lambda work, *args, **kwargs: simulation.wait_for_work(wait, work, *args, **kwargs)


def _waiting(simulation: Simulation, name: str) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        simulated = not isinstance(tensor, (FakeTensor, DTensor)) and tensor.device.type == "cpu"
        if simulated and not simulation.memory.block_of(tensor).on_host:
            simulation.wait_on_host(simulation.current.seen)
        return original(tensor, *args, **kwargs)

    return method


@contextmanager
def _replaced(in_place: list[tuple[Any, str, Any]]) -> Iterator[None]:
    own = [(owner, name, vars(owner).get(name, mock.DEFAULT)) for owner, name, _ in in_place]
    for owner, name, value in in_place:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in own:
            if value is mock.DEFAULT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@cache
def _name(operation: Any) -> str:
    return f"{operation.namespace}.{operation.overloadpacket.__name__}"


def _is_asynchronous(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether a collective goes to a stream of its group; arguments that have their default value are not passed."""
    for position, argument in enumerate(operation._schema.arguments):
        if argument.name in ("async_op", "asyncOp"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given)
    return False


def _accesses(operation: Any, name: str, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes in place."""
    if name in WITHOUT_ACCESS:
        return [], []
    if name in OUTPUT_FIRST:
        return tensors_in(args[1]), tensors_in(args[0])
    if name == "fsdp.all_gather_copy_in":
        return tensors_in(args[0]), tensors_in(args[1])
    if operation.namespace == "c10d":
        return [], tensors_in(args)
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    written = _written(operation)
    for position, value in enumerate(args):
        (writes if position in written else reads).extend(tensors_in(value))
    for key, value in kwargs.items():
        (writes if key in written else reads).extend(tensors_in(value))
    return reads, writes


@cache
def _written(operation: Any) -> frozenset[int | str]:
    """Positions and names of the arguments that an operation writes in place."""
    written: set[int | str] = set()
    for position, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {position, argument.name}
    return frozenset(written)


_ROOT = Path(package_streams.__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_PASSES_ON = {__file__, memory.__file__, contextlib.__file__}


_known: dict[int, tuple[Any, str, str]] = {}  # by identity of the code, which is kept: its hash takes long


def _owner_of(code: Any) -> tuple[Any, str, str]:
    """A function's code, whose it is, and its file; the owner is empty for what only passes calls on."""
    file, path = code.co_filename, Path(code.co_filename)
    if path.is_relative_to(_ROOT) or file in COUNT_AS_PACKAGE:
        return code, "package", path.name
    if path.is_relative_to(_TORCH / "distributed" / "fsdp"):
        return code, "fsdp", path.name
    passes_on = path.is_relative_to(_TORCH) or file.startswith("<") or file in _PASSES_ON
    return code, "" if passes_on else "user", path.name


def _place() -> tuple[str, Place]:
    """Whose code runs an operation, and where: the innermost frames of the package, of FSDP2 and of the user."""
    frame, frames, owner = sys._getframe(1), [], ""
    while frame is not None and len(frames) < 4:
        code = frame.f_code
        known = _known.get(id(code))
        if known is None:
            known = _known[id(code)] = _owner_of(code)
        of_frame = known[1]
        if of_frame:
            owner = owner or of_frame
            frames.append((code, frame.f_lasti))
            if of_frame == "user":
                break
        elif code.co_name == "_engine_run_backward":  # its operations are those of the user's forward
            owner = owner or "user"
        frame = frame.f_back
    return owner or "user", tuple(frames)


def _in_words(place: Place) -> str:
    """A place in words, which few need: the line of an instruction takes a while to find."""
    return " < ".join(
        f"{_known[id(code)][2]}:{list(code.co_positions())[instruction // 2][0]} {code.co_name}"
        for code, instruction in place
    )


__all__ = ["Problem", "Simulation", "simulated_streams"]
