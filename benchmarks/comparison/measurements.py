"""The figures of the result page, from ``results.json`` alone: medians and spreads, ratios, differences.

Figures that were read from a clock or a link are *measured*; those that come out of a formula are *computed*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.comparison.systems import EVERYTHING, GATHERED

# The one of ours that each system is compared with: the one whose model states reach as far. The second is for systems
# that keep all parameters and gradients on each rank.
OURS = {
    "node": ("mics@node", "mics-kept@node"),
    "two-nodes": ("mics-once-per-step@two-nodes", "mics-kept@two-nodes"),
    "world": ("mics-once-per-step@world", "mics-kept@world"),
}
BASELINE = "ddp"  # the losses of all others are compared with its losses


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of several runs, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """``None`` if there are no values."""
        found = list(values)
        return cls(median=median(found), least=min(found), greatest=max(found)) if found else None

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(median=self.median * factor, least=self.least * factor, greatest=self.greatest * factor)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a figure was measured under; a rate of ``None`` is unshaped."""

    shape: str
    rate_mbit: float | None
    micro_steps: int


class Measurements:
    """The launches of ``results.json``.

    Args:
        results: What the file holds.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.facts = {name: value for name, value in results.items() if name != "launches"}
        self.launches: list[dict[str, Any]] = results["launches"]

    @classmethod
    def read(cls, file: Path) -> Measurements:
        """The measurements in a file."""
        return cls(json.loads(file.read_text()))

    @property
    def shapes(self) -> list[str]:
        """All shapes, such as ``2x4``, in order of nodes."""
        return sorted({launch["shape"] for launch in self.launches}, key=lambda shape: int(shape.split("x")[0]))

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The launches that failed."""
        return [launch for launch in self.launches if not launch["ok"]]

    def systems(self, shape: str | None = None, *, reach: str | None = None) -> list[str]:
        """The systems on a shape, with a reach, or all: those with the same reach together, ours last among them."""
        reaches = {
            launch["system"]: launch["reach"]
            for launch in self.launches
            if shape in (None, launch["shape"]) and reach in (None, launch["reach"])
        }
        return sorted(reaches, key=lambda name: (list(OURS).index(reaches[name]), is_ours(name), name))

    def reach(self, system: str) -> str:
        """How far the model states of one replica reach under this system."""
        return str(next(launch["reach"] for launch in self.launches if launch["system"] == system))

    def versions(self, system: str) -> dict[str, str]:
        """The versions of the packages that this system consists of."""
        return next((launch["versions"] for launch in self._good(system=system)), {})

    def keeps(self, system: str) -> str:
        """What each rank keeps from one micro-step to the next."""
        return str(next(launch["keeps"] for launch in self.launches if launch["system"] == system))

    def ours(self, system: str) -> str:
        """The one of ours that reaches as far and keeps as much."""
        return OURS[self.reach(system)][self.keeps(system) in (GATHERED, EVERYTHING)]

    def notes(self, system: str) -> list[str]:
        """What the system's program says of how it was set, without repetitions."""
        return list(dict.fromkeys(note for launch in self._good(system=system) for note in launch["notes"]))

    def step_seconds(self, system: str, setting: Setting) -> Spread | None:
        """Measured: seconds of one optimizer step on the slowest rank, over all steps of all rounds."""
        phases = self._phases(system, setting)
        return Spread.of(max(ranks) for phase in phases for ranks in zip(*phase["seconds"], strict=True))

    def step_bytes(self, system: str, setting: Setting) -> Spread | None:
        """Measured: bytes that one node's link sent per optimizer step, over all nodes and rounds."""
        phases = self._phases(system, setting)
        return Spread.of(sent / phase["steps"] for phase in phases for sent in phase["sent_bytes"])

    def accounting(self, system: str, shape: str) -> Spread | None:
        """Measured: bytes by the program's own accounting over those of the link, over nodes, phases and rounds."""
        launches = self._good(system=system, shape=shape, purpose="timing")
        counts = [
            zip(phase["accounted_bytes"], phase["sent_bytes"], strict=True)
            for launch in launches
            for phase in launch["phases"]
        ]
        return Spread.of(own / sent for pairs in counts for own, sent in pairs if own is not None and sent)

    def least_bytes(self, shape: str) -> float:
        """Computed: 2M(N-1)/N, what each of N nodes must send per step at least, with M bytes of parameters."""
        nodes = int(shape.split("x")[0])
        return float(2 * self.facts["parameter_bytes"] * (nodes - 1) / nodes)

    def left_over(self, system: str, setting: Setting) -> float | None:
        """Computed from measured medians: seconds of a step above the larger of computation and transfer.

        The computation is the step with unshaped links, which also moves the bytes as fast as this machine can.
        """
        if setting.rate_mbit is None:
            return None
        free = Setting(shape=setting.shape, rate_mbit=None, micro_steps=setting.micro_steps)
        step, computation = self.step_seconds(system, setting), self.step_seconds(system, free)
        sent = self.step_bytes(system, setting)
        if step is None or computation is None or sent is None:
            return None
        return step.median - max(computation.median, sent.median * 8 / (setting.rate_mbit * 1e6))

    def speed_of_ours(self, system: str, setting: Setting) -> float | None:
        """Computed from measured medians: how many times faster ours is."""
        return _ratio(self.step_seconds(system, setting), self.step_seconds(self.ours(system), setting))

    def bytes_over_ours(self, system: str, setting: Setting) -> float | None:
        """Computed from measured medians: how many times the bytes of ours."""
        return _ratio(self.step_bytes(system, setting), self.step_bytes(self.ours(system), setting))

    def loss_difference(self, system: str, shape: str, purpose: str) -> float | None:
        """Computed: the greatest difference of any rank's loss in any step from the baseline's."""
        baseline = self._baseline_losses(shape, purpose)
        differences = [
            abs(one - other)
            for launch in self._good(system=system, shape=shape, purpose=purpose)
            for phase in launch["phases"]
            if phase["name"] in baseline
            for one, other in zip(baseline[phase["name"]], _losses(phase), strict=True)
        ]
        if not differences:
            return None
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def losses_compared(self, shape: str, purpose: str) -> int:
        """How many losses of each system are compared with the baseline's, over all ranks and steps."""
        return sum(map(len, self._baseline_losses(shape, purpose).values()))

    def _baseline_losses(self, shape: str, purpose: str) -> dict[str, list[float]]:
        """By phase; the rounds of one system do not differ in them."""
        launches = self._good(system=BASELINE, shape=shape, purpose=purpose)
        return {phase["name"]: _losses(phase) for launch in launches for phase in launch["phases"]}

    def _good(self, **wanted: str) -> Iterator[dict[str, Any]]:
        for launch in self.launches:
            if launch["ok"] and all(launch[name] == value for name, value in wanted.items()):
                yield launch

    def _phases(self, system: str, setting: Setting) -> list[dict[str, Any]]:
        return [
            phase
            for launch in self._good(system=system, shape=setting.shape, purpose="timing")
            for phase in launch["phases"]
            if (phase["rate_mbit"], phase["micro_steps"]) == (setting.rate_mbit, setting.micro_steps)
        ]


def is_ours(system: str) -> bool:
    """Whether a system is this package, and no peer."""
    return system.startswith("mics")


def _ratio(one: Spread | None, other: Spread | None) -> float | None:
    return None if one is None or other is None or not other.median else one.median / other.median


def _losses(phase: dict[str, Any]) -> list[float]:
    return [loss for rank in phase["losses"] for loss in rank]
