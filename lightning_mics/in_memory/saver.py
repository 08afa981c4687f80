"""Saving optimizer steps in memory, beside the training.

::

    training   step k done: collects | forward, backward of k + 1           | step of the optimizer | step k + 1 done
    thread     all ranks have k - 1: begin, copy, checksums, (unchanged?) commit, k is on another node

Sharded tensors are copied while the next forward and backward run, which do not change them; what may change
meanwhile, such as buffers and the states of random number generators, is copied at once. The next step of an optimizer
waits for the copy. If a sharded tensor was changed before that, as a hook may do, the step is not complete: it is
dropped, and from then on training waits for the copies.

Two slots are enough, because all ranks know at a boundary which step all of them have on two nodes: each brings the
newest of its own to the comparison that is begun there. They write over the other slot, so that step stays until all
have a newer one. It costs no time: the thread waits for the comparison.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_mics._torch.streams import current_stream, has_streams, new_stream, on_stream
from lightning_mics.in_memory.holdings import Key
from lightning_mics.in_memory.keeper.client import ANSWER_SECONDS, KeeperConnection
from lightning_mics.in_memory.keeper.memory import Keep, PartLayout, Stamp
from lightning_mics.in_memory.plan import Part, Plan, blob_capacity
from lightning_mics.in_memory.reading import StoredPart
from lightning_mics.in_memory.slots import Slots
from lightning_mics.in_memory.table import decoded, end_of

AT_ONCE_BYTES = 2**26
PROTECT_SECONDS = 60.0  # until a step is on another node
NOTHING = -1  # no step


class StepSaver:
    """Saves steps of one rank in the memory of its node's keeper.

    Args:
        connection: Connection to the keeper, which nobody else uses.
        rank: This rank.
        world_size: Number of ranks.
        generation: Number of this start of the job.
        plan: Plan of this rank.
        device: Device of the tensors.
        protected_step: Step that all ranks have on two nodes already; -1 if there is none.

    Attributes:
        plan: Plan of this rank.
        protected_step: Newest step of this rank that is on two nodes; -1 if there is none.
        slot_bytes: Bytes of a slot of this rank; 0 before the first save.
    """

    def __init__(
        self,
        connection: KeeperConnection,
        *,
        rank: int,
        world_size: int,
        generation: int,
        plan: Plan,
        device: torch.device,
        protected_step: int = NOTHING,
    ) -> None:
        self.plan = plan
        self.protected_step = protected_step
        self.slot_bytes = 0
        self._connection = connection
        self._rank = rank
        self._world_size = world_size
        self._generation = generation
        self._device = device
        self._slots: Slots | None = None
        self._layout: list[Any] = []
        self._saving: _Saving | None = None
        self._beside = True

    def save(self, step: int, *, read_protected: Callable[[], int]) -> None:
        """Save the tensors of the plan as a step; :meth:`wait_until_protected` was called before.

        Args:
            step: Number of optimizer steps done.
            read_protected: Function that waits for all ranks, and returns the newest step that all of them have on two
                nodes; a thread calls it.

        Raises:
            KeeperError: If the keeper cannot make the slots.
        """
        self._open()
        private = self.plan.private
        now = Part(private.kind, private.rank, private.places, [v.to("cpu", copy=True) for v in private.values])
        now.blob = private.blob
        saving = _Saving(
            step=step,
            parts=[now, *self.plan.rows],
            sharded=self.plan.sharded,
            versions=_versions(self.plan.sharded),
            ready=_recorded(self._device),
        )
        saving.start(lambda: self._write(saving, read_protected))
        self._saving = saving
        if not self._beside:
            saving.copied.wait()
        self.confirm()

    def copy(self, stamp: Stamp, parts: Sequence[StoredPart]) -> None:
        """Save a step that some keepers hold, as it is; returns when it is on two nodes.

        What is loaded stays where it is: another rank may die before all have saved it again.

        Args:
            stamp: The step.
            parts: The parts of this rank, in their order.

        Raises:
            DamagedCheckpointError: If a part is damaged on all nodes.
            KeeperError: If the step cannot be saved.
        """
        layouts = [_layout_of(part) for part in parts]
        slots = Slots(self._connection, rank=self._rank, layouts=layouts, device=torch.device("cpu"))
        keep = stamp.generation, stamp.step
        slot, sizes = self._begin(keep), [part.size_bytes for part in parts]
        for number, part in enumerate(parts):
            for first in range(0, sizes[number], AT_ONCE_BYTES):
                count = min(AT_ONCE_BYTES, sizes[number] - first)
                slots.write(slot, number, first, part.read(first, count, f"the {part.key[0]} part"))
        keys = [part.key for part in parts]
        self._commit(slot, stamp.step, keep, dict(zip(keys, sizes, strict=True)), slots.checksums(slot, sizes))
        slots.close()

    def confirm(self, *, wait: bool = False) -> None:
        """Tell the thread whether what it has copied was unchanged until now.

        Args:
            wait: Whether to wait for the copy, because tensors may change after this call.
        """
        saving = self._saving
        if saving is None or saving.confirmed.is_set():
            return
        if wait:
            saving.copied.wait()
        changed = saving.versions != _versions(saving.sharded)
        if changed and self._beside:
            self._beside = False
            warnings.warn(
                "a sharded tensor was changed between two steps of the optimizer, while it was copied for the "
                f"in-memory checkpoint: that of step {saving.step} is dropped, and from now on training waits for the "
                "copies",
                stacklevel=2,
            )
        if changed or saving.copied.is_set():
            saving.unchanged = not changed
            saving.confirmed.set()

    def wait_until_protected(self) -> int:
        """Wait until the step that was saved last is on two nodes; returns the newest one that is.

        Raises:
            KeeperError: If it cannot be.
        """
        if self._saving is not None:
            self.confirm(wait=True)
            saving, self._saving = self._saving, None
            saving.result()
        return self.protected_step

    def close(self) -> None:
        """Close the connection; what is being saved is not waited for, and the keeper holds the step before."""
        self._connection.close()
        if self._slots is not None:
            self._slots.close()

    def _open(self) -> None:
        parts = self.plan.parts
        layout = [(part.kind, part.rank, part.blob_capacity, part.places) for part in parts]
        if layout != self._layout:
            if self._slots is not None:
                self._slots.close()
            layouts = [part.layout() for part in parts]
            self._slots = Slots(self._connection, rank=self._rank, layouts=layouts, device=self._device)
            self._layout = layout
            self.slot_bytes = sum(entry.capacity_bytes for entry in layouts)

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _write(self, saving: _Saving, read_protected: Callable[[], int]) -> None:
        slots = self._slots
        assert slots is not None
        try:
            keep = self._generation, read_protected()
            slot = self._begin(keep)
            self._copy(slots, slot, saving)
        finally:
            saving.copied.set()
        sizes = [part.used_bytes for part in saving.parts]
        checksums = slots.checksums(slot, sizes)
        saving.confirmed.wait()
        if saving.unchanged:
            keys = [(part.kind, part.rank) for part in saving.parts]
            self._commit(slot, saving.step, keep, dict(zip(keys, sizes, strict=True)), checksums)

    def _begin(self, keep: Keep) -> int:
        """Empty a slot, and return its number."""
        request = {"do": "begin", "rank": self._rank, "keep": keep, "generation": self._generation}
        return int(self._connection.ask(request)[0]["slot"])

    def _commit(self, slot: int, step: int, keep: Keep, sizes: Mapping[Key, int], checksums: bytes) -> None:
        """Complete a slot, and wait until another node has what has to be there."""
        stamp = [self._generation, step, self._world_size]
        self._connection.ask(
            {
                "do": "commit",
                "rank": self._rank,
                "slot": slot,
                "keep": keep,
                "stamp": stamp,
                "sizes": [[*key, size] for key, size in sizes.items()],
                "forward": self.plan.forwarded,
            },
            checksums,
        )
        self._connection.wait_at_most(PROTECT_SECONDS + ANSWER_SECONDS)
        self._connection.ask({"do": "wait", "rank": self._rank, "stamp": stamp, "seconds": PROTECT_SECONDS})
        self.protected_step = step

    def _copy(self, slots: Slots, slot: int, saving: _Saving) -> None:
        if has_streams(self._device):
            torch.accelerator.set_device_index(self._device.index or 0)  # a new thread begins on the first one
            stream = new_stream(self._device)
            stream.wait_event(saving.ready)
            with on_stream(stream, self._device):
                for values, memory in slots.targets(slot, saving.parts):
                    memory.copy_(values, non_blocking=True)
            stream.synchronize()
        else:
            for values, memory in slots.targets(slot, saving.parts):
                memory.copy_(values)
        private = saving.parts[0]
        slots.write(slot, 0, private.tensor_bytes, private.blob)


@dataclass
class _Saving:
    """A step that is being saved, and the thread that does it: ended with the process, whatever it waits for."""

    step: int
    parts: list[Part]
    sharded: list[DTensor]
    versions: list[int]
    ready: Any  # event after which the tensors are as they should be; None on a CPU

    def __post_init__(self) -> None:
        self.copied = threading.Event()
        self.confirmed = threading.Event()
        self.unchanged = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised in the main thread
                self._error = error

        self._thread = threading.Thread(target=run, name="in-memory checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> None:
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error


def _layout_of(part: StoredPart) -> PartLayout:
    """The layout with which a rank saves such a part."""
    table = part.table()
    tensor_bytes = end_of(decoded(table))
    return PartLayout(*part.key, tensor_bytes + blob_capacity(part.size_bytes - tensor_bytes), table)


def _versions(tensors: list[DTensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _recorded(device: torch.device) -> Any:
    """An event after the work that is enqueued now; None on a CPU."""
    return current_stream(device).record_event() if has_streams(device) else None
