"""Sending what no other node has to the keeper of another one, while the ranks train on."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.keeper.memory import Area, Keep, Slot, Stamp, layout_digest
from lightning_mics.in_memory.keeper.wire import KeeperError

AGAIN_SECONDS = 0.5  # between two attempts


class Forwarding:
    """A thread that sends parts of complete slots, in the order of their commits.

    A slot is protected when the other keeper has acknowledged it, or at once where nothing is to be sent.

    Args:
        token: Secret of the job.
        lock: Lock of the keeper's state, notified when a step is protected.

    Attributes:
        target: Host and port of the other keeper; None on a single node.
        problem: Why the last attempt failed; None if it did not.
        failing_since: Time of the first of the attempts that have failed, seconds; None if the last did not.
    """

    def __init__(self, token: str, lock: threading.Condition) -> None:
        self._token = token
        self._lock = lock
        self._queue: deque[_Sending] = deque()
        self._connection: KeeperConnection | None = None
        self._known: set[str] = set()  # layouts that the other keeper has
        self.target: list[Any] | None = None
        self.problem: str | None = None
        self.failing_since: float | None = None

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def connect(self, target: list[Any] | None) -> None:
        """Send to another keeper from now on; what waits for the earlier one is dropped."""
        with self._lock:
            self.target, self.problem, self.failing_since = target, None, None
            self._queue.clear()
            self._disconnect()

    def add(self, area: Area, slot: Slot, parts: list[tuple[str, int]], *, keep: Keep) -> None:
        """Protect a slot that is complete; the caller has the lock.

        Args:
            area: Area of a rank of this node.
            slot: One of its slots.
            parts: Kind and rank of what must be sent.
            keep: Generation and step that the other keeper must not write over.
        """
        assert slot.stamp is not None
        if self.target is None:
            area.protected = slot.stamp
        else:
            self._queue.append(_Sending(area, slot, slot.stamp, parts, keep))
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._queue))
                sending, target = self._queue[0], self.target
            try:
                is_held = sending.slot.stamp == sending.stamp
                if is_held and target is not None:
                    self._send(target, sending)
                self.problem, self.failing_since = None, None
            except (KeeperError, OSError) as error:
                self.problem, self.failing_since = str(error), self.failing_since or time.monotonic()
                with self._lock:
                    self._disconnect()
                    self._lock.wait(AGAIN_SECONDS)
                continue
            with self._lock:
                if self._queue and self._queue[0] is sending:
                    self._queue.popleft()
                    if is_held:  # not if a rank that has started again writes over it
                        sending.area.protected = sending.stamp
                    self._lock.notify_all()

    def _send(self, target: list[Any], sending: _Sending) -> None:
        if self._connection is None:
            self._known.clear()
            self._connection = KeeperConnection.remote(target, token=self._token)
        area, slot, stamp, keys = sending.area, sending.slot, sending.stamp, sending.parts
        parts = [area.parts[key] for key in keys]
        layout = layout_digest(parts)
        if layout not in self._known:
            self._connection.ask(
                {"do": "keep", "rank": area.owner, "parts": [part.plain() for part in parts]},
                *(part.table for part in parts),
            )
            self._known.add(layout)
        self._connection.ask(
            {
                "do": "put",
                "layout": layout,
                "stamp": [stamp.generation, stamp.step, stamp.world_size],
                "sizes": [[*key, slot.sizes[key]] for key in keys],
                "keep": sending.keep,
            },
            *(slot.checksums[key] for key in keys),
            *(area.view(slot, key, slot.sizes[key]) for key in keys),
        )

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True, eq=False)
class _Sending:
    area: Area
    slot: Slot
    stamp: Stamp
    parts: list[tuple[str, int]]
    keep: Keep
