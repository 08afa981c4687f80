"""An event simulation of one micro-step: arithmetic, the links inside nodes and the network, in FSDP2's order.

Each collective runs on one kind of link, which serves one after the other, in the order in which FSDP2 launches them.
What waits for what, for a unit i of the forward order::

    forward    gather i     begins when the arithmetic of unit i - 2 does: FSDP2 frees its buffer then
    backward   gather i     begins when the arithmetic of unit i + 1 does: one unit is prefetched
               reduce i     begins when unit i has its gradients, and after the reduction of unit i + 1
               arithmetic   of unit i begins after the reduction of unit i + 2, whose buffer it fills
    both       arithmetic   of a unit waits for its gather

The root is gathered first and stays unsharded; its arithmetic, mostly the head of a language model, comes last in
forward and first in backward. A micro-step ends when the last reduction does. Stages of a collective follow each other;
the stages of two units use different links and run side by side. Inputs of blocks that wait on the host travel on links
of their own, one in each direction.

Durations of arithmetic are arrays, so that one pass simulates all micro-batches of a job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Link = Literal["inside", "between"]
Seconds: TypeAlias = NDArray[np.float64]  # one entry per micro-batch
Later: TypeAlias = Callable[[Any, Any], Any]  # the maximum of two times, each a float or an array

FEW = 4  # micro-batches, up to which Python's floats are faster than arrays


@dataclass(frozen=True)
class Stage:
    """One collective on one kind of link.

    Attributes:
        link: Links that it takes: those inside nodes, or the network "between" them.
        seconds: Duration without other collectives.
    """

    link: Link
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UnitStages:
    """The collectives of a parameter group in a micro-step, in order.

    Attributes:
        forward: Stages of the gather in forward.
        backward: Stages of the gather in backward.
        reduction: Stages of the reduction over the partition group.
        second_hop: Stages of the reduction over replicas.
    """

    forward: tuple[Stage, ...] = ()
    backward: tuple[Stage, ...] = ()
    reduction: tuple[Stage, ...] = ()
    second_hop: tuple[Stage, ...] = ()


def micro_step_seconds(
    units: Sequence[UnitStages],
    shares: Sequence[float],
    *,
    forward: Seconds,
    backward: Seconds,
    units_ahead: int = 0,
    host: Seconds | None = None,
) -> Seconds:
    """Seconds of a micro-step, [micro-batches].

    Args:
        units: Collectives of each parameter group, the root first, then the blocks in the order of forward.
        shares: Share of the arithmetic of each parameter group; they add up to 1.
        forward: Seconds of the arithmetic in forward, [micro-batches].
        backward: Seconds of the arithmetic in backward, with recomputation, [micro-batches].
        units_ahead: Further units whose first of two stages is prefetched, in forward and in backward.
        host: Seconds in which the input of a block travels to the host, and in backward from it: [micro-batches]; None
            leaves inputs on the device.
    """
    run = partial(_simulate, units, shares, units_ahead)
    if len(forward) > FEW:
        found: Seconds = run(forward, backward, host, np.maximum)
        return found
    hosts = [None] * len(forward) if host is None else host.tolist()
    return np.array([run(*each, max) for each in zip(forward.tolist(), backward.tolist(), hosts, strict=True)])


def _simulate(
    units: Sequence[UnitStages],
    shares: Sequence[float],
    units_ahead: int,
    forward: Any,
    backward: Any,
    host: Any,
    later: Later,
) -> Any:
    links, start = _Links(later), 0 * forward
    inputs = _Inputs(host, later)
    gathers = _Gathers(links, [unit.forward for unit in units], units_ahead, later)
    begun = [start]  # arithmetic in forward, of the root and each block
    ends = gathers.run(0, start)
    for index in range(1, len(units)):
        gathered = gathers.run(index, begun[max(0, index - 2)])
        begun.append(later(ends, gathered))
        inputs.save(begun[-1])
        ends = begun[-1] + shares[index] * forward
    begins = ends + shares[0] * forward

    gathers = _Gathers(links, [unit.backward for unit in units[:0:-1]], units_ahead, later)
    ends = begins + shares[0] * backward
    gathered = gathers.run(0, begins)
    reduced, before, synchronized = start, start, start  # of the unit before, of the one before that, over replicas
    for number, index in enumerate(range(len(units) - 1, 0, -1), 1):
        begins = inputs.take(later(later(ends, gathered), before))
        gathered = gathers.run(number, begins)
        ends = begins + shares[index] * backward
        before, reduced = reduced, links.run(units[index].reduction, later(ends, reduced))
        synchronized = later(synchronized, links.run(units[index].second_hop, reduced))
    reduced = links.run(units[0].reduction, later(ends, reduced))
    return later(later(ends, synchronized), links.run(units[0].second_hop, reduced))


class _Gathers:
    """The gathers of a forward or a backward, in order.

    Args:
        links: Links that they take.
        stages: Stages of each gather.
        ahead: Further units whose first of two stages is run before.
        later: Maximum of two times.
    """

    def __init__(self, links: _Links, stages: Sequence[Sequence[Stage]], ahead: int, later: Later) -> None:
        self._later = later
        self._links = links
        self._first = [each[:-1] for each in stages]  # what may run ahead
        self._last = [each[-1:] for each in stages]
        self._ahead = ahead
        self._arrived: list[Any] = []

    def run(self, number: int, ready: Any) -> Any:
        """Launch a gather when ``ready``, and the first stages of those ahead; returns when it ends."""
        while len(self._arrived) <= min(number + self._ahead, len(self._first) - 1):
            self._arrived.append(self._links.run(self._first[len(self._arrived)], ready))
        if number >= len(self._last):
            return ready
        return self._links.run(self._last[number], self._later(ready, self._arrived[number]))


class _Inputs:
    """The inputs of recomputed blocks on the host, each fetched while the block after it is recomputed.

    Args:
        host: Seconds in which one travels to the host, and back; None leaves all on the device.
        later: Maximum of two times.
    """

    def __init__(self, host: Any, later: Later) -> None:
        self._host = host
        self._later = later
        self._saved: list[Any] = []
        self._ahead: Any = None

    def save(self, ready: Any) -> None:
        """Send the input of the next block to the host, when the block has begun."""
        if self._host is not None:
            self._saved.append(self._later(ready, self._saved[-1] if self._saved else ready) + self._host)

    def take(self, ready: Any) -> Any:
        """When the input of the last block that was saved is there, if its recomputation may begin when ``ready``."""
        if self._host is None:
            return ready
        saved = self._saved.pop()
        ready = self._later(ready, self._later(ready, saved) + self._host if self._ahead is None else self._ahead)
        if self._saved:
            self._ahead = self._later(ready, self._saved[-1]) + self._host
        return ready


class _Links:
    """When each kind of link is free."""

    def __init__(self, later: Later) -> None:
        self._later = later
        self._free: dict[Link, Any] = {}

    def run(self, stages: Sequence[Stage], ready: Any) -> Any:
        """Run stages one after the other, the first when ``ready``; returns when the last ends."""
        for stage in stages:
            free = self._free.get(stage.link)
            ready = (ready if free is None else self._later(ready, free)) + stage.seconds
            self._free[stage.link] = ready
        return ready
