"""Mutants: seeded faults, each applied in the forked ranks of a training under MiCS and nowhere else.

The strategy is made again in each rank. :class:`Mutated` applies the chosen mutant there; in the process that forks the
ranks, and in those of the reference, nothing is changed.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_mics import MiCSStrategy

UNITS = ("root", "blocks.0", "blocks.1")  # parameter groups of the module


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: Name, which determines the fault.
        kind: Kind of the fault.
        place: Where it is: a function with its unit, step or line.
        apply: Function that changes this process so that it has the fault.
        lines: File, first and last line of the changed code, by which the trainings that reach it are found; None if
            they are not known.
    """

    name: str
    kind: str
    place: str
    apply: Callable[[], None] = field(compare=False, repr=False)
    lines: tuple[str, int, int] | None = None


class Chosen:
    """The mutant of this process and the ranks that it forks.

    Attributes:
        apply: Function that applies it; None applies nothing.
        marks: Folder for files by which ranks say that a mutant has acted or could not be applied.
        strategy: Strategy of this rank, once it is made.
    """

    def __init__(self) -> None:
        self.apply: Callable[[], None] | None = None
        self.marks = Path()
        self.strategy: Any = None

    def step(self) -> int:
        """Optimizer steps so far."""
        return int(self.strategy.lightning_module.trainer.global_step)

    def micro_step(self) -> int:
        """Micro-steps so far in this window."""
        loop = self.strategy.lightning_module.trainer.fit_loop
        return int(loop.batch_idx) % int(loop.trainer.accumulate_grad_batches)

    def mark(self, name: str, text: str = "") -> None:
        """Leave a file for the process that has forked this rank."""
        path = self.marks / name
        if not path.exists():
            path.write_text(text)

    def take_marks(self) -> dict[str, str]:
        """The texts of all marks by name, which are removed."""
        found = {}
        for path in self.marks.iterdir():
            found[path.name] = path.read_text()
            path.unlink()
        return found


chosen = Chosen()


class Mutated(MiCSStrategy):
    """The strategy, in ranks with the chosen mutant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if dist.is_initialized() and chosen.apply is not None:
            chosen.strategy = self
            try:
                chosen.apply()
            except BaseException:
                chosen.mark("not-applied", traceback.format_exc())
                raise


@dataclass(frozen=True)
class At:
    """Where a fault acts; None is everywhere.

    Attributes:
        unit: Parameter group.
        step: Optimizer steps before.
        rank: Rank.
        micro_step: Micro-steps before in the window.
    """

    unit: str | None = None
    step: int | None = None
    rank: int | None = None
    micro_step: int | None = None

    def __str__(self) -> str:
        parts = [
            self.unit or "",
            "" if self.step is None else f"step {self.step + 1}",
            "" if self.micro_step is None else f"micro-step {self.micro_step + 1}",
            "" if self.rank is None else f"rank {self.rank}",
        ]
        return ", ".join(filter(None, parts)) or "everywhere"

    def here(self, unit: str | None = None) -> bool:
        """Whether it acts now.

        Args:
            unit: Parameter group whose turn it is; None if there is none.
        """
        return (
            (self.unit is None or self.unit == unit)
            and (self.rank is None or self.rank == dist.get_rank())
            and (self.step is None or self.step == chosen.step())
            and (self.micro_step is None or self.micro_step == chosen.micro_step())
        )


def acts() -> None:
    """Note that a fault acts now."""
    chosen.mark("acted")


def around(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Call ``change(original, ...)`` in place of a function.

    Args:
        owner: Class, module or object that has the function.
        name: Name of the function.
        change: Function that gets the original one and its arguments.
    """
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    setattr(owner, name, changed)


def lines_of(function: Any, text: str = "") -> tuple[str, int, int] | None:
    """File, first and last line of a function, or of its first line with a text; None if it has none.

    Args:
        function: Function or method, perhaps a property or wrapped.
        text: Text of one of its lines.
    """
    function = getattr(function, "fget", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    first, file = code.co_firstlineno, os.path.realpath(code.co_filename)
    last = max((line for *_, line in code.co_lines() if line), default=first)
    if text:
        source = Path(file).read_text().splitlines()
        first = last = next(line for line in range(first, last + 1) if text in source[line - 1])
    return file, first, last
