"""The parts by name: their titles and modules, which are imported where they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the program.

    Attributes:
        title: Title on the page.
        module: Module with its function ``run(findings)``.
    """

    title: str
    module: str


PARTS = {
    "same_bits": Part("Same bits", "benchmarks.gpu.same_bits"),
    "nccl": Part("NCCL at one rank", "benchmarks.gpu.nccl"),
    "memory": Part("Memory", "benchmarks.gpu.memory"),
    "speed": Part("Speed", "benchmarks.gpu.speed"),
    "saving": Part("Saving", "benchmarks.gpu.saving"),
    "profiler": Part("Seen in a profiler", "benchmarks.gpu.profiler"),
}
SECONDS = 530  # after which a part is ended
