"""The result of a certification: a table of what was compared, and where it differs and why."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_mics.certification.differences import Difference
from lightning_mics.certification.rows import Row

MOST_SHOWN = 6  # differences in words


class NotCertifiedError(AssertionError):
    """Training differs from the reference; the message is the report."""


class CannotCertifyError(RuntimeError):
    """The reference itself cannot be trained, or the module cannot be made small enough.

    Args:
        said: What went wrong.
        trace: Traceback of the process where it did.
    """

    def __init__(self, said: str, trace: str = "") -> None:
        super().__init__(said)
        self.trace = trace


@dataclass(frozen=True)
class CertifyReport:
    """What :func:`~lightning_mics.certification.certify.certify` has found.

    Attributes:
        module: Name of the module's class.
        reference: What the ranks were compared with, in words.
        runs: Options of each training, by its name.
        rows: Comparisons, in the order in which they were made.
        failures: Errors of ranks that did not finish, by training.
        traces: Tracebacks of these errors, by training.
        notes: What was shrunk, lifted, raised or not compared, in words.
        reasons: What the differences point to, in words.
        seconds: Duration.
    """

    module: str
    reference: str
    runs: dict[str, str]
    rows: Sequence[Row]
    failures: dict[str, str] = field(default_factory=dict)
    traces: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    reasons: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all trainings have finished, and nothing differs beyond rounding."""
        return not self.failures and all(row.ok for row in self.rows)

    def raise_if_wrong(self) -> None:
        """Raise unless everything agrees.

        Raises:
            NotCertifiedError: If something differs.
        """
        if not self.ok:
            differing = [
                f"{row.run}, {row.what}: {_described(row.first)}" for row in self.rows if row.first is not None
            ]
            said = [f"{run} did not finish: {error}" for run, error in self.failures.items()] + differing
            raise NotCertifiedError("\n".join([f"{self.module} is NOT certified: {said[0]}", *self.reasons]))

    def to_json(self) -> str:
        """All of it as JSON; infinite numbers are strings."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1, default=str).replace("Infinity", '"infinity"')

    def write(self, path: str | Path) -> None:
        """Write the JSON to a file.

        Args:
            path: Path of the file.
        """
        Path(path).write_text(self.to_json())

    def __str__(self) -> str:
        verdict = "is certified" if self.ok else "is NOT certified"
        lines = [f"{self.module} {verdict} against {self.reference} ({self.seconds:.1f} s)", ""]
        lines += [f"  {name}: {options}" for name, options in self.runs.items()]
        lines += ["", *_table(self.rows), ""]
        lines += [f"{run} did not finish: {error}" for run, error in self.failures.items()]
        for row in [row for row in self.rows if row.first is not None][:MOST_SHOWN]:
            assert row.first is not None
            lines.append(f"{row.run}, {row.what}: {_described(row.first)}")
        lines += [f"Likely: {reason}" for reason in self.reasons]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


def _described(first: Difference) -> str:
    told = first.factor is not None and f"{first.factor:.6g}" != "1"
    factor = f": {first.factor:.6g} times the right value" if told else ""
    return f"differs first at {first.where}, {first.moment}, by {_number(first.relative)}{factor}"


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for all trainings together, and the worst of them, for each thing that was compared."""
    head = ("what", "compared", "largest difference", "allowed", "where", "")
    body = []
    for what in dict.fromkeys(row.what for row in rows):
        of_all = [row for row in rows if row.what == what]
        worst = max(of_all, key=lambda row: row.worst.ratio)
        where = f"{worst.worst.where}, {worst.worst.moment} ({worst.run})" if worst.worst.relative else ""
        wrong = sum(not row.ok for row in of_all)
        body.append(
            (
                what,
                str(sum(row.compared for row in of_all)),
                _number(worst.worst.relative),
                _number(worst.worst.allowed),
                where,
                f"WRONG in {wrong} of {len(of_all)}" if wrong else "",
            )
        )
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = (zip(line, widths, strict=True) for line in lines)
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in padded]


def _number(value: float) -> str:
    return "0" if value == 0 else "infinite" if math.isinf(value) else f"{value:.1e}"
