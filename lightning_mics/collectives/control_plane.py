"""The control plane: ranks agree on what they communicate next, and hear of each other's errors.

[Note: Agreement without waiting]

A collective of one rank meets the next collective of the others, whatever it is: the parameters of another block, if
they have the same size. So ranks have to agree on what each collective is *before* it begins, and must not wait for it.

Each set of ranks that communicates has a :class:`Stream`: the entries that its ranks have agreed on, such as "gathers
'blocks.1' in a forward". From them every rank predicts the next entry: what came next the last time. All predict the
same, because all have the same entries. A rank whose next entry is the predicted one goes on at once. A rank whose
entry is another one may not: it *meets* the others, on the CPU, and goes on if all of them come with this entry::

    rank 0    gathers a, b, c   as predicted: goes on     gathers a, b, c   as predicted: goes on, waits for rank 1
    rank 1    gathers a, b, c   as predicted: goes on     gathers a, c      not as predicted: waits for rank 0 to agree

So no collective ever meets another one, and there are no wrong weights. In a steady training all predictions are right,
and agreement costs a look into a dictionary for each entry; where all ranks do something new, it costs a meeting.

Meetings and collectives that others do not come to are noticed by a thread on each rank, the *watcher*. It looks into
the job's store twice a second. A rank that has waited in a meeting posts there what it wants to do; the watchers of the
others compare it with what their rank did at this position of the stream. The first that finds a difference posts the
verdict; all watchers read it, and abort the process groups, so that every rank raises it from wherever it waits. A rank
that raises an exception, or whose program ends, posts that as well, and does not wait.

A comparison that nobody has to wait for at once, such as that of signals after each step, stays in flight while ranks
train, meet and save, all on one gloo group. Gloo numbers the collectives of a group as they are begun, and delivers
messages by this number and the kind of collective, however many are in flight. So they match if all ranks *begin* them
in one order; when each rank waits does not matter. The order is agreed on: a comparison is an entry of the streams and
begins right after it. Ranks come to a position of a stream either all as predicted, and begin the comparison without a
meeting, or all unexpectedly, and begin it after the meeting. In between lies an error: some have begun a comparison,
others a meeting of the same number. These are of different kinds, so neither receives the other's data, and the
watchers end both. Collectives inside of an operation of all ranks, such as saving, come after its entry.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics._torch.control import (
    exchange,
    gloo_group,
    group_of_all,
    has_timed_out,
    is_rehearsed,
    job_store,
    was_cut_off,
)
from lightning_mics.collectives import watcher
from lightning_mics.collectives.watcher import RAISES, Waiting, Watcher, difference, kind

RECENT = 8192  # entries that a stream can be asked for: a rank that need not wait is at most some steps ahead
RECORD = 384  # bytes of a record in a meeting


class RanksDifferError(RuntimeError):
    """Ranks called different units, or the same ones in another order or number; or one of them has raised."""

    raised_by_all_ranks = True


class MissingRanksError(RuntimeError):
    """A collective has timed out; the message names the ranks that did not come.

    Args:
        found: Which ranks they are, in words.
        error: Error of the collective.
    """

    def __init__(self, found: str, error: BaseException) -> None:
        super().__init__(f"{found}. {error}")
        self.found = found


class Stream:
    """What the ranks of one scope have agreed to do, in order. See [Note: Agreement without waiting].

    Args:
        ranks: Ranks that agree.
        group: Gloo group of these ranks, for meetings.
        plane: Control plane of this process.
    """

    def __init__(self, ranks: tuple[int, ...], *, group: dist.ProcessGroup, plane: ControlPlane) -> None:
        self.ranks = ranks
        self.waiting: Waiting | None = None
        self._group = group
        self._plane = plane
        self._next: dict[Any, str] = {}  # what came next the last time
        self._last = ""
        self._since_start = 0  # entries since the last optimizer step
        self._entries: deque[tuple[str, int]] = deque(maxlen=RECENT)  # with their micro-steps
        self._count = 0

    def agree(self, entry: str, *, starts_over: bool = False) -> None:
        """Go on if ``entry`` is what all ranks do next; wait for them only if it was not to be expected.

        Args:
            entry: What this rank does next, in words.
            starts_over: Whether what follows resembles what followed the last such entry, as after an optimizer step.

        Raises:
            RanksDifferError: If another rank does something else.
        """
        place = (self._since_start, self._last)
        if self._plane.verdict is not None or entry != (self._next.get(place) or self._next.get(self._last)):
            self._meet(entry)
        self._next[place] = self._next[self._last] = entry
        self.add(entry)
        self._since_start = 0 if starts_over else self._since_start + 1
        if len(self._next) > 100_000:  # at the same entry on all ranks
            self._next.clear()

    def add(self, entry: str) -> int:
        """Add ``entry`` without agreement; returns its position."""
        self._entries.append((entry, self._plane.micro_step))
        self._plane.last_entry = entry
        self._last = entry
        self._count += 1
        return self._count - 1

    def at(self, position: int) -> tuple[str, int] | None:
        """What this rank did at ``position``, or wants to do now, and its micro-step; None if it is not there yet."""
        waiting, index = self.waiting, position - self._count + len(self._entries)
        if waiting is not None and waiting.position == position:
            return waiting.entry, waiting.micro_step
        return self._entries[index] if 0 <= index < len(self._entries) else None

    def _meet(self, entry: str) -> None:
        self._plane.check()
        self.waiting = waiting = Waiting(entry, self._count, self._plane.micro_step, time.monotonic())
        try:
            records = exchange(self._group, _record(waiting))
        except RuntimeError as error:
            raise self._plane.explained(error) from error
        finally:
            self.waiting = None
        self._plane.has_raised = False  # the program went on
        found = [_of_record(record) for record in records]
        if len({digest for digest, _ in found}) > 1:
            self._plane.declare(
                difference({rank: words for rank, (_, words) in zip(sorted(self.ranks), found, strict=True)})
            )
            self._plane.check()


class ControlPlane:
    """Agreement and errors of all ranks of a job; one per default process group, from :func:`control_plane`.

    Args:
        timeout: Longest time of a meeting; None is gloo's default.

    Attributes:
        verdict: Error of the job in words; None while there is none.
        micro_step: Micro-step that this rank is in, counted from 1 since the first model was sharded.
        has_raised: Whether this rank has raised an exception, which matters more than its verdict.
        last_entry: What this rank has begun last, in words, in any stream.
        has_lost_ranks: Whether a connection to another rank was lost, and nobody said why: it has probably died.
    """

    def __init__(self, *, timeout: timedelta | None) -> None:
        self.verdict: str | None = None
        self.micro_step = 1
        self.has_raised = False
        self.has_lost_ranks = False
        self.last_entry = "the start"
        self._timeout = timeout
        self._streams: dict[tuple[int, ...], Stream] = {}
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._group: dist.ProcessGroup | None = None
        self._watcher: Watcher | None = None
        if not is_rehearsed():  # there all ranks agree
            self._group = group_of_all(timeout=timeout)
            if self._size > 1:
                self._watcher = Watcher(self, job_store(self._group), self._streams)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group of all ranks, also where there is one; None, the default group, in a rehearsal."""
        return self._group

    @property
    def doing(self) -> str:
        """What this rank does now, in words."""
        waiting = [stream.waiting.entry for stream in list(self._streams.values()) if stream.waiting is not None]
        return f"{(waiting or [self.last_entry])[0]!r} (micro-step {self.micro_step})"

    def stream(self, ranks: Sequence[int]) -> Stream | None:
        """The stream of ``ranks``, all of which call; None where nobody could differ."""
        scope = tuple(sorted(ranks))
        if self._group is None or len(scope) == 1:
            return None
        if scope not in self._streams:
            whole = len(scope) == self._size
            group = self._group if whole else gloo_group(scope, timeout=self._timeout)
            self._streams[scope] = Stream(scope, group=group, plane=self)
        return self._streams[scope]

    def agree(self, entry: str) -> None:
        """Agree on what all ranks do next, in all streams of this rank.

        Args:
            entry: What they do, in words.

        Raises:
            RanksDifferError: If another rank does something else.
        """
        for stream in list(self._streams.values()):
            stream.agree(entry)

    @contextmanager
    def together(self, entry: str) -> Iterator[None]:
        """Run an operation of all ranks inside, such as saving, once they agree on it.

        Args:
            entry: What they do, in words.

        Raises:
            RanksDifferError: If another rank does something else, before the operation or while this rank waits in it.
        """
        self.agree(entry)
        with self._explaining():
            yield

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            explained = self.explained(error)
            if explained is error:
                raise
            raise explained from error

    def largest(self, values: torch.Tensor, entry: str = "compares a value with all ranks") -> torch.Tensor:
        """The elementwise maximum over all ranks, [any], on the CPU; every rank calls it.

        Args:
            values: Values of this rank on the CPU: [any].
            entry: What is done, in words.

        Raises:
            RanksDifferError: If other ranks do something else.
        """
        return self.begin_largest(values, entry)()

    def any_of(self, bits: Sequence[bool], entry: str) -> list[bool]:
        """Which of the ``bits`` are set on any rank, by a meeting; every rank calls it.

        Args:
            bits: Bits of this rank, as many on every rank.
            entry: What is done, in words.

        Raises:
            RanksDifferError: If other ranks do something else.
        """
        self.agree(entry)
        if self._group is None or self._size == 1:
            return list(bits)
        with self._explaining():
            records = exchange(self._group, bytes(bits))
        return [any(of_bit) for of_bit in zip(*records, strict=True)]

    def begin_largest(self, values: torch.Tensor, entry: str) -> Callable[[], torch.Tensor]:
        """Begin :meth:`largest` and return a function that waits for its result; every rank calls both.

        Collectives may be in flight at the same time: see [Note: Agreement without waiting].

        Args:
            values: Values of this rank on the CPU, [any], which must not change until the function has returned.
            entry: What is done, in words.

        Raises:
            RanksDifferError: If other ranks do something else; the function raises it too.
        """
        self.agree(entry)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def result() -> torch.Tensor:
            with self._explaining():
                work.wait()
            return values

        return result

    def check(self) -> None:
        """Raise the job's error, if there is one.

        Raises:
            RanksDifferError: If ranks were found to differ.
        """
        if self.verdict is not None:
            raise RanksDifferError(self.verdict)

    def declare(self, verdict: str) -> None:
        """Make ``verdict`` the error of all ranks, unless there is one already."""
        if self._watcher is not None:
            self.verdict = self._watcher.post(verdict)

    def raised(self, error: BaseException) -> None:
        """Tell the other ranks that this one has raised ``error``; does not wait for them."""
        if self.has_raised or isinstance(error, RanksDifferError) or was_cut_off(error):
            return
        self.has_raised = True
        if self._watcher is not None:
            self._watcher.tell_end(f"{RAISES}{type(error).__name__}: {str(error)[:200]}")

    def explained(self, error: BaseException) -> BaseException:
        """The job's error in place of ``error``, if that one is its effect; waits a moment until it is known.

        Where a collective has timed out, all ranks are asked what they do: some may not answer.

        A rank that has raised an exception has said so before it ended. One that has died has not, and nobody waits:
        the others lose their connections one after the other, and each would wait anew.
        """
        if self._watcher is None or not was_cut_off(error) or isinstance(error, MissingRanksError):
            return error
        if has_timed_out(error) and self.verdict is None and not self.has_lost_ranks:
            self.has_lost_ranks = True
            found = watcher.missing(self._watcher.call_roll(), rank=self._rank, doing=self.doing)
            if self.verdict is None:
                return MissingRanksError(found, error)
        until = time.monotonic() + (0.0 if self.has_lost_ranks else watcher.ANSWER)
        while self.verdict is None and self._watcher.has_news() and time.monotonic() < until:
            time.sleep(watcher.TICK / 5)
        self.has_lost_ranks = True
        return error if self.verdict is None else RanksDifferError(self.verdict)


@dataclass(frozen=True)
class _Job:
    group: object  # the default process group
    timeout: timedelta | None = field(compare=False)


@lru_cache(maxsize=1)
def _plane_of(job: _Job) -> ControlPlane:
    return ControlPlane(timeout=job.timeout)


def control_plane(timeout: timedelta | None = None) -> ControlPlane:
    """The control plane of the running job, made by the first call, which every rank makes.

    Args:
        timeout: Longest time in which a rank may be late; None is gloo's default.
    """
    return _plane_of(_Job(dist.group.WORLD, timeout))


def _record(waiting: Waiting) -> bytes:
    entry = kind(waiting.entry)
    digest = hashlib.sha256(f"{waiting.position} {entry}".encode()).digest()
    words = f"{waiting.entry} (micro-step {waiting.micro_step})".encode()
    return (digest + words[: RECORD - len(digest)]).ljust(RECORD, b"\0")


def _of_record(record: bytes) -> tuple[bytes, str]:
    return record[:32], record[32:].rstrip(b"\0").decode(errors="replace")
