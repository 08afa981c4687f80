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
the stages of two units use different links and run side by side. What waits on the host travels on two more links, one
in each direction, which all of it shares: inputs of recomputed blocks, cached slices, of which the next is fetched with
a gather, and sums, of which the next is fetched with a reduction and goes back after it.

Durations of arithmetic are arrays, so that one pass simulates all micro-batches of a job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Link = Literal["inside", "between", "to host", "from host"]
Seconds: TypeAlias = NDArray[np.float64]  # one entry per micro-batch
Later: TypeAlias = Callable[[Any, Any], Any]  # the maximum of two times, each a float or an array

FEW = 4  # micro-batches, up to which Python's floats are faster than arrays


@dataclass(frozen=True)
class Stage:
    """One collective on one kind of link.

    Attributes:
        link: Links that it takes: those inside nodes, the network "between" them, or the one to or from the host.
        seconds: Duration without other collectives.
    """

    link: Link
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UnitStages:
    """The collectives of a parameter group in a micro-step, in order, and its copies to and from the host.

    Attributes:
        forward: Stages of the gather in forward, the first of which may be a copy from the host.
        backward: Stages of the gather in backward, likewise.
        reduction: Stages of the reduction over the partition group.
        second_hop: Stages of the reduction over replicas.
        filled: Copy of what the gather in forward has cached to the host.
        sum_before: Copy of the sum from the host.
        sum_after: Copy of the sum to the host.
    """

    forward: tuple[Stage, ...] = ()
    backward: tuple[Stage, ...] = ()
    reduction: tuple[Stage, ...] = ()
    second_hop: tuple[Stage, ...] = ()
    filled: tuple[Stage, ...] = ()
    sum_before: tuple[Stage, ...] = ()
    sum_after: tuple[Stage, ...] = ()


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
    inputs = _Inputs(host, links, later)
    gathers = _Gathers(links, [unit.forward for unit in units], units_ahead, later)
    begun = [start]  # arithmetic in forward, of the root and each block
    ends = gathers.run(0, start)
    links.run(units[0].filled, ends)
    for index in range(1, len(units)):
        gathered = gathers.run(index, begun[max(0, index - 2)])
        begun.append(later(ends, gathered))
        links.run(units[index].filled, gathered)
        inputs.save(begun[-1])
        ends = begun[-1] + shares[index] * forward
    begins = ends + shares[0] * forward

    gathers = _Gathers(links, [unit.backward for unit in units[:0:-1]], units_ahead, later)
    ends = begins + shares[0] * backward
    gathered = gathers.run(0, begins)
    reduced, before, synchronized = start, start, start  # of the unit before, of the one before that, over replicas
    sums = _Sums(links, [unit for unit in (*units[:0:-1], units[0]) if unit.reduction or unit.sum_before], later)
    for number, index in enumerate(range(len(units) - 1, 0, -1), 1):
        begins = inputs.take(later(later(ends, gathered), before))
        gathered = gathers.run(number, begins)
        ends = begins + shares[index] * backward
        before, reduced = reduced, sums.run(units[index], later(ends, reduced))
        synchronized = later(synchronized, links.run(units[index].second_hop, reduced))
    reduced = sums.run(units[0], later(ends, reduced))
    ends = later(later(ends, synchronized), links.run(units[0].second_hop, reduced))
    return links.idle(("to host", "from host"), ends)


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
        self._ahead = [1 if each and each[0].link == "from host" else ahead for each in stages]
        self._arrived: list[Any] = []

    def run(self, number: int, ready: Any) -> Any:
        """Launch a gather when ``ready``, and the first stages of those ahead; returns when it ends."""
        while len(self._arrived) < len(self._first) and len(self._arrived) <= number + self._ahead[len(self._arrived)]:
            self._arrived.append(self._links.run(self._first[len(self._arrived)], ready))
        if number >= len(self._last):
            return ready
        return self._links.run(self._last[number], self._later(ready, self._arrived[number]))


class _Inputs:
    """The inputs of recomputed blocks on the host, each fetched while the block after it is recomputed.

    Args:
        host: Seconds in which one travels to the host, and back; None leaves all on the device.
        links: Links that they take.
        later: Maximum of two times.
    """

    def __init__(self, host: Any, links: _Links, later: Later) -> None:
        self._host = host
        self._links = links
        self._later = later
        self._saved: list[Any] = []
        self._ahead: Any = None

    def save(self, ready: Any) -> None:
        """Send the input of the next block to the host, when the block has begun."""
        if self._host is not None:
            self._saved.append(self._links.occupy("to host", self._host, ready))

    def take(self, ready: Any) -> Any:
        """When the input of the last block that was saved is there, if its recomputation may begin when ``ready``."""
        if self._host is None:
            return ready
        saved = self._saved.pop()
        if self._ahead is None:
            self._ahead = self._links.occupy("from host", self._host, self._later(ready, saved))
        ready = self._later(ready, self._ahead)
        if self._saved:
            self._ahead = self._links.occupy("from host", self._host, self._later(ready, self._saved[-1]))
        return ready


class _Sums:
    """The reductions of a backward, in order, with sums on the host, of which the next is fetched with each.

    Args:
        links: Links that they take.
        units: Parameter groups that are reduced.
        later: Maximum of two times.
    """

    def __init__(self, links: _Links, units: Sequence[UnitStages], later: Later) -> None:
        self._links = links
        self._later = later
        self._units = units
        self._number = 0
        self._fetched: Any = None

    def run(self, unit: UnitStages, ready: Any) -> Any:
        """Reduce a unit when ``ready``, and copy sums; returns when it is added up."""
        if not (unit.reduction or unit.sum_before):
            return ready
        arrived = self._links.run(unit.sum_before, ready) if self._fetched is None else self._fetched
        self._number += 1
        following = self._units[self._number] if self._number < len(self._units) else None
        self._fetched = None if following is None else self._links.run(following.sum_before, ready)
        added = self._later(self._links.run(unit.reduction, ready), arrived)
        self._links.run(unit.sum_after, added)
        return added


class _Links:
    """When each kind of link is free."""

    def __init__(self, later: Later) -> None:
        self._later = later
        self._free: dict[Link, Any] = {}

    def run(self, stages: Sequence[Stage], ready: Any) -> Any:
        """Run stages one after the other, the first when ``ready``; returns when the last ends."""
        for stage in stages:
            ready = self.occupy(stage.link, stage.seconds, ready)
        return ready

    def occupy(self, link: Link, seconds: Any, ready: Any) -> Any:
        """Use one link for some seconds when ``ready``; returns when it is free again."""
        free = self._free.get(link)
        self._free[link] = (ready if free is None else self._later(ready, free)) + seconds
        return self._free[link]

    def idle(self, links: Sequence[Link], ready: Any) -> Any:
        """When some links are free and others are ``ready``."""
        for link in links:
            ready = self._later(ready, self._free.get(link, ready))
        return ready
