"""Noticing nodes and processes that do not answer, long before a collective times out.

Each keeper asks the next node's once a second. If that one has not answered for some seconds, or a rank of this node is
stopped, the keeper says so in the output of its ranks and ends them. It answers the node before it with the reason,
which ends its ranks in turn, and so on around the ring: ranks that wait for a node that is cut off would do so for
long. The launcher starts all again.

A node that was cut off may come back when the job has gone on without it. Its keeper is told so by the next one, whose
steps are of a later start, and ends: what it holds is outdated.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.keeper.wire import KeeperError

PING_SECONDS = 1.0


class Watching:
    """Watches the next node's keeper and the ranks of this node.

    Args:
        token: Secret of the job.
        silence_seconds: Time without an answer after which ranks are ended.
        outdated: Function that is called when the job has gone on without this node.

    Attributes:
        complete_generation: Newest start of the job of which all ranks have a step; 0 before there is one.
    """

    def __init__(self, token: str, *, silence_seconds: float, outdated: Callable[[], None]) -> None:
        self._token = token
        self._silence_seconds = silence_seconds
        self._outdated = outdated
        self._generation = 0
        self._reason: str | None = None  # why ranks of this generation were ended
        self.complete_generation = 0
        self._ranks: dict[int, int] = {}  # rank by process
        self._stopped_since: dict[int, float] = {}
        self._epoch = 0
        self._answered = 0.0
        self._target: list[Any] | None = None

    def begin(self, target: list[Any] | None, ranks: Mapping[int, int], *, generation: int) -> None:
        """Watch another keeper and other ranks from now on.

        Args:
            target: Host and port of the keeper of the next node; None on a single node.
            ranks: Ranks of this node, by process.
            generation: Number of this start of the job.
        """
        self._ranks, self._target = dict(ranks), target
        self._generation, self._reason = generation, None
        self._stopped_since.clear()
        self._answered = time.monotonic()
        self._epoch += 1
        if target is not None:
            threading.Thread(target=self._ping, args=(target, self._epoch), daemon=True).start()

    def answer(self) -> dict[str, Any]:
        """What the keeper of the node before hears when it asks."""
        return {"generation": self._generation, "reason": self._reason, "complete": self.complete_generation}

    def gone(self, process: int) -> None:
        """Do not end a process that has ended by itself: its number may be another's by now."""
        self._ranks.pop(process, None)

    def look(self) -> None:
        """End ranks that have to be ended; called about once a second."""
        now = time.monotonic()
        if self._target is not None and self._ranks and now - self._answered > self._silence_seconds:
            host, port = self._target
            self._end(
                list(self._ranks),
                f"the node of {host}:{port} has not answered for {now - self._answered:.0f} s: it is cut off or dead, "
                "so all ranks end, for the launcher to start them again",
            )
        for process, rank in list(self._ranks.items()):
            if not _is_stopped(process):
                self._stopped_since.pop(process, None)
            elif now - self._stopped_since.setdefault(process, now) > self._silence_seconds:
                self._end(
                    list(self._ranks),
                    f"rank {rank} (process {process}) is stopped since {now - self._stopped_since[process]:.0f} s, so "
                    "all ranks end, for the launcher to start them again",
                )

    def _ping(self, target: list[Any], epoch: int) -> None:
        connection: KeeperConnection | None = None
        while self._epoch == epoch:
            try:
                if connection is None:
                    connection = KeeperConnection.remote(target, token=self._token, seconds=PING_SECONDS)
                    connection.wait_at_most(PING_SECONDS)
                answer, _ = connection.ask({"do": "ping"})
                if self._epoch == epoch:
                    self._answered = time.monotonic()
                    self._hear(answer)
            except (KeeperError, OSError):
                if connection is not None:
                    connection.close()
                connection = None
            time.sleep(PING_SECONDS)

    def _hear(self, answer: Mapping[str, Any]) -> None:
        if int(answer["complete"]) > self._generation:
            self._outdated()
        elif answer["reason"] and answer["generation"] == self._generation and not self._reason:
            self._end(list(self._ranks), str(answer["reason"]))

    def _end(self, processes: list[int], reason: str) -> None:
        self._ranks, self._reason = {}, reason
        for process in processes:
            with suppress(OSError), open(f"/proc/{process}/fd/2", "w") as output:
                output.write(f"\nin-memory checkpoints: {reason}\n")
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"
