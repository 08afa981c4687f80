"""Activations of a micro-step: the most bytes that they take in each phase of it, for any number of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Phase = Literal[
    "start", "forward", "gather", "loss", "head", "last", "blocks", "second", "between", "first", "end", "reduced"
]


ALL_SAVED: tuple[Phase, ...] = (
    "forward",
    "gather",
    "loss",
    "head",
    "last",
    "blocks",
)  # phases with activations of all blocks


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the number of samples.

    Attributes:
        fixed: Bytes that do not depend on it: gradients that are not reduced yet, losses computed in pieces.
        per_sample: Bytes of one sample.
    """

    fixed: float = 0.0
    per_sample: float = 0.0

    def at(self, samples: int) -> float:
        """Bytes of ``samples`` samples."""
        return self.fixed + self.per_sample * samples

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_sample + other.per_sample)


Phases = Mapping[Phase, tuple[Line, ...]]


@dataclass(frozen=True)
class Activations:
    """The most bytes of activations, and of gradients before they are reduced, in each phase of a micro-step.

    A phase has several moments that may be its peak: few samples have it where many gradients are there, many samples
    where many activations are.

    Attributes:
        phases: Moments of each phase that may be its peak::

                start    until the forward of the first block
                forward  until that of the last block has ended
                gather   before the forward of the last block
                loss     until the forward has ended
                head     until the backward of the last block
                last     backward of the last block
                blocks   backward of the blocks between
                second   backward of the second block
                between  its end, before the first block is there
                first    backward of the first block
                end      until the backward has ended
                reduced  its end, before the gradients of the root are reduced
        saved: Bytes of one sample that a block saves for its backward.
        on_host: Bytes of one sample that wait for the backward in host memory.
        few: Phases of micro-batches of up to ``few_samples``, where a loss is not computed in pieces.
        few_samples: Largest micro-batch that ``few`` is for.
    """

    phases: Phases = field(default_factory=dict)
    saved: float = 0.0
    on_host: float = 0.0
    few: Phases = field(default_factory=dict)
    few_samples: int = 0

    def peaks(self, samples: int) -> dict[Phase, float]:
        """Most bytes in each phase.

        Args:
            samples: Samples of the micro-batch.
        """
        phases = self.few if samples <= self.few_samples else self.phases
        return {phase: max(line.at(samples) for line in lines) for phase, lines in phases.items()}

    def with_saved(self, bytes_per_sample: float) -> Activations:
        """The same with more bytes saved by all blocks together.

        Args:
            bytes_per_sample: Bytes of one sample to add, before the backward reaches the second block.
        """
        added = Line(per_sample=bytes_per_sample)
        phases, few = (
            {
                phase: tuple(line + added for line in lines) if phase in ALL_SAVED else lines
                for phase, lines in of.items()
            }
            for of in (self.phases, self.few)
        )
        return replace(self, phases=phases, few=few)

    def __or__(self, other: Activations) -> Activations:
        """The larger of both in each phase."""
        phases, few = (
            {phase: essential((*one.get(phase, ()), *another.get(phase, ()))) for phase in {**one, **another}}
            for one, another in ((self.phases, other.phases), (self.few, other.few))
        )
        return replace(
            self,
            phases=phases,
            few=few,
            saved=max(self.saved, other.saved),
            on_host=max(self.on_host, other.on_host),
        )


def essential(lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines that are not below another everywhere."""
    kept: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.fixed, line.per_sample), reverse=True):
        if not kept or line.per_sample > kept[-1].per_sample:
            kept.append(line)
    return tuple(kept)


def partly_recomputed(saved: Activations, recomputed: Activations, *, blocks: int, share: float) -> Activations:
    """Activations of a model, some of whose blocks are recomputed.

    Args:
        saved: Activations without recomputation.
        recomputed: Activations with all blocks recomputed.
        blocks: Number of blocks.
        share: Share of the blocks that are recomputed.
    """
    fewer = blocks * (saved.saved - recomputed.saved)  # bytes that recomputing all of them saves
    partly = saved.with_saved(-share * fewer) | recomputed.with_saved((1 - share) * fewer)
    return replace(partly, on_host=share * recomputed.on_host)
