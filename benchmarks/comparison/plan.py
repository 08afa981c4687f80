"""A plan: what one run trains, and the phases of it. The orchestrator writes it as JSON, every rank reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.comparison.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Optimizer steps under one rate of the links and one number of micro-steps; warm-up steps are not measured."""

    name: str
    rate_mbit: float | None  # None: not shaped
    micro_steps: int
    warmup_steps: int
    steps: int

    def __post_init__(self) -> None:
        for name, least in (("micro_steps", 1), ("warmup_steps", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"phase {self.name!r}: {name}={getattr(self, name)} must be at least {least}")

    @property
    def all_steps(self) -> int:
        """Optimizer steps, warm-up included."""
        return self.warmup_steps + self.steps


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run. Phases continue each other's training."""

    workload: Workload
    ranks_per_node: int
    optimizer: str
    phases: tuple[Phase, ...]

    def first_step(self, phase_index: int) -> int:
        """Optimizer steps before this phase."""
        return sum(phase.all_steps for phase in self.phases[:phase_index])

    def to_json(self) -> str:
        """As :meth:`from_json` reads it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from what :meth:`to_json` wrote.

        Raises:
            TypeError: If a key is missing or unknown.
        """
        values = json.loads(text)
        workload = Workload(**values.pop("workload"))
        phases = tuple(Phase(**phase) for phase in values.pop("phases"))
        return cls(workload=workload, phases=phases, **values)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a JSON file."""
        return cls.from_json(path.read_text())
