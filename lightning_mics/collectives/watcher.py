"""The watcher of a rank: a thread that finds ranks that differ, while their main threads wait for each other.

See [Note: Agreement without waiting].
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_mics._torch.control import abort_groups

if TYPE_CHECKING:
    from lightning_mics.collectives.control_plane import ControlPlane, Stream

PATIENCE = 1.0  # seconds in a meeting before the others are asked
TICK = 0.5  # seconds between two looks of a watcher into the store
ANSWER = 3.0  # seconds in which a failed collective is explained
RAISES = "raises "  # an exception, whichever it is

_log = logging.getLogger(__name__)


@dataclass
class Waiting:
    """A meeting that this rank waits in.

    Attributes:
        entry: What it wants to do.
        position: Position in the stream.
        micro_step: Micro-step of this rank, from 1.
        since: Time at which it came, seconds.
        told: Whether the others have been asked.
    """

    entry: str
    position: int
    micro_step: int
    since: float
    told: bool = False


@dataclass
class RollCall:
    """A question to all ranks what they do.

    Attributes:
        ranks: The other ranks.
        number: Number of the question in the store; None before it is there.
        answers: What each rank that has answered does, in words.
    """

    ranks: list[int]
    number: int | None = None
    answers: dict[int, str] = field(default_factory=dict)


class Watcher:
    """The thread of one rank that looks for entries of others that differ from its own, and for the verdict.

    Args:
        plane: Control plane of this process, whose job the thread ends with.
        store: Store of the job.
        streams: Streams of the plane, by their ranks.
    """

    def __init__(self, plane: ControlPlane, store: Any, streams: dict[tuple[int, ...], Stream]) -> None:
        self._plane = plane
        self._store = store
        self._job = dist.group.WORLD
        self._streams = streams
        self._rank = dist.get_rank()
        self._asked = 0  # questions of others that were read
        self._open: list[dict[str, Any]] = []  # those that this rank cannot answer yet
        self._roll: RollCall | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mics control plane", daemon=True)
        self._thread.start()
        atexit.register(self._end)
        self._report, sys.excepthook = sys.excepthook, self._report_and_tell

    def post(self, verdict: str) -> str:
        """Post a verdict; returns the one that holds, which another rank may have posted before."""
        with self._lock:
            return str(self._store.compare_set("verdict", "", verdict).decode())

    def tell_end(self, entry: str) -> None:
        """Post that this rank will not take part any more, in all of its streams."""
        with suppress(dist.DistError):  # the rank that keeps the store has ended before
            for stream in self._streams.values():
                self._ask(stream, entry, stream.add(entry), self._plane.micro_step)

    def _ask(self, stream: Stream, entry: str, position: int, micro_step: int) -> None:
        question = {"rank": self._rank, "ranks": stream.ranks, "entry": entry, "at": position, "step": micro_step}
        with self._lock:
            number = self._store.add("asked", 1)
            self._store.set(f"question/{number}", json.dumps(question))

    def call_roll(self) -> RollCall:
        """Ask all ranks what they do, and wait a moment for their answers."""
        roll = self._roll = RollCall([rank for rank in range(dist.get_world_size()) if rank != self._rank])
        until = time.monotonic() + ANSWER
        while len(roll.answers) < len(roll.ranks) and time.monotonic() < until:
            time.sleep(TICK / 5)
        self._roll = None
        return roll

    def _go_on_with_roll(self, roll: RollCall) -> None:
        with self._lock:
            if roll.number is None:
                number = self._store.add("asked", 1)
                self._store.set(f"question/{number}", json.dumps({"rank": self._rank, "roll": number}))
                roll.number = number
            for rank in roll.ranks:
                key = f"roll/{roll.number}/{rank}"
                if rank not in roll.answers and self._store.check([key]):
                    roll.answers[rank] = self._store.get(key).decode()

    def _watch(self) -> None:
        plane = self._plane
        while not self._stop.wait(TICK) and dist.group.WORLD is self._job:
            try:
                self._look(plane)
            except Exception as error:  # the store is gone, with the rank or the agent that held it
                _log.debug("the control plane has lost its store: %r", error)
                return
            if plane.verdict is not None and dist.group.WORLD is self._job:
                _log.error("rank %d: %s", self._rank, plane.verdict)
                abort_groups()
                self.hear()
                return

    def _look(self, plane: ControlPlane) -> None:
        now = time.monotonic()
        for stream in list(self._streams.values()):
            waiting = stream.waiting
            if waiting is not None and not waiting.told and now - waiting.since > PATIENCE:
                waiting.told = True
                self._ask(stream, waiting.entry, waiting.position, waiting.micro_step)
        with self._lock:
            asked = self._store.add("asked", 0)
            keys = [f"question/{number}" for number in range(self._asked + 1, asked + 1)]
            if keys and self._store.check(keys):
                self._open += [json.loads(self._store.get(key)) for key in keys]
                self._asked = asked
        self._open = [question for question in self._open if not self._answer(plane, question)]
        if (roll := self._roll) is not None:
            self._go_on_with_roll(roll)
        with self._lock:
            if plane.verdict is None and self._store.check(["verdict"]):
                plane.verdict = self._store.get("verdict").decode()

    def _answer(self, plane: ControlPlane, question: dict[str, Any]) -> bool:
        """Compare an entry of another rank with this rank's; returns whether that is done."""
        if "roll" in question:
            if question["rank"] != self._rank:
                with self._lock:
                    self._store.set(f"roll/{question['roll']}/{self._rank}", plane.doing)
            return True
        stream = self._streams.get(tuple(question["ranks"]))
        if stream is None or question["rank"] == self._rank:
            return True
        own = stream.at(question["at"])
        if own is None:
            return False
        if kind(own[0]) != kind(question["entry"]):
            theirs = f"{question['entry']} (micro-step {question['step']})"
            words = {question["rank"]: theirs, self._rank: f"{own[0]} (micro-step {own[1]})"}
            plane.verdict = self.post(difference(words))
        return True

    def has_news(self) -> bool:
        """Whether other ranks have asked something that is not answered yet, or there is a verdict."""
        try:
            with self._lock:
                asked = bool(self._store.add("asked", 0) > self._asked)
                return asked or bool(self._open) or bool(self._store.check(["verdict"]))
        except RuntimeError:  # the store is gone, with the rank or the agent that held it
            return False

    def hear(self) -> None:
        """Count this rank among those that know why the job ends."""
        with self._lock, suppress(RuntimeError):
            self._store.add("heard", 1)

    def _report_and_tell(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Report an exception that ends this program, and stay until the others know: the store may end with it."""
        self._report(kind, error, trace)
        nothing_to_tell = self._plane.has_lost_ranks and self._plane.verdict is None
        if nothing_to_tell or dist.group.WORLD is not self._job:
            return
        self._plane.raised(error)
        self.hear()
        until = time.monotonic() + ANSWER
        with suppress(RuntimeError):
            while time.monotonic() < until and self._store.add("heard", 0) < dist.get_world_size():
                time.sleep(TICK / 5)

    def _end(self) -> None:
        """Post the end of this program, and stop; before the interpreter ends, which no thread survives."""
        is_cause = not (self._plane.has_raised or self._plane.has_lost_ranks)
        if is_cause and self._plane.verdict is None and dist.group.WORLD is self._job:
            with suppress(RuntimeError):  # the store is gone, so the job is over
                self.tell_end("ends its program")
        self._stop.set()
        self._thread.join(timeout=2)


def kind(entry: str) -> str:
    """What must be equal in the entries of all ranks: the entry, or that a rank has raised."""
    return RAISES if entry.startswith(RAISES) else entry


def difference(words: dict[int, str]) -> str:
    """What each rank does, in one sentence; ranks that do the same together."""
    ranks: dict[str, list[int]] = {}
    for rank, entry in words.items():
        ranks.setdefault(entry, []).append(rank)
    sides = sorted(ranks.items(), key=lambda side: (not side[0].startswith(RAISES), len(side[1]), side[1]))
    does = ", while ".join(f"{_named(of)} {entry}" for entry, of in sides)
    if sides[0][0].startswith(RAISES):
        return f"{does}: all ranks stop, as the others would wait for it for ever"
    return (
        f"ranks take different ways: {does}. All ranks must call the same units, in the same order and as often; if "
        "it depends on a rank's own data which of them are used in training, pass allow_unused=True"
    )


def missing(roll: RollCall, *, rank: int, doing: str) -> str:
    """Which ranks do not answer, or are elsewhere, in one sentence.

    Args:
        roll: The answers.
        rank: Rank that has asked.
        doing: What it does itself.
    """
    if roll.number is None:
        return "the job's store does not answer: the node that holds it has died, or the network to it is cut"
    silent = [other for other in roll.ranks if other not in roll.answers]
    if silent:
        verb, whose = ("does", "it has died, is stopped, or its node") if len(silent) == 1 else (
            "do", "they have died, are stopped, or their node"
        )  # fmt: skip
        return f"{_named(silent)} {verb} not answer: {whose} cannot be reached"
    places: dict[str, list[int]] = {}
    for other, place in roll.answers.items():
        places.setdefault(place, []).append(other)
    elsewhere = [f"{_named(of)} is at {place}" for place, of in places.items() if place != doing]
    if elsewhere:
        return f"{', '.join(elsewhere[:3])}, while rank {rank} is at {doing}"
    return "all ranks answer, and are at the same place: the network between them is cut, or too slow"


def _named(ranks: list[int]) -> str:
    others = ", ".join(map(str, ranks[1:]))
    return f"rank {ranks[0]} (like {others})" if others else f"rank {ranks[0]}"
