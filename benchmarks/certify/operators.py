"""Operators: faults that are made at every unit, step, rank and strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from benchmarks.certify.mutants import UNITS, At, Mutant, lines_of

Apply = Callable[[At, Any], None]


@dataclass(frozen=True)
class Operator:
    """A fault and the places that it is made at.

    Attributes:
        kind: Kind of the fault.
        name: Name of the function that makes it.
        apply: Function that changes this process, given the place and the variant.
        variants: Strengths or ways.
        places: Places of the fault.
        changed: Function that is changed, by whose lines the trainings that reach it are found; None if it is not one
            of those whose lines are followed.
        line: Text of the line of that function without which the fault does not act; empty for any line.
    """

    kind: str
    name: str
    apply: Apply
    variants: tuple[Any, ...]
    places: tuple[At, ...]
    changed: Any
    line: str = ""

    def mutants(self) -> Iterator[Mutant]:
        """The mutants of all variants and places."""
        lines = lines_of(self.changed, self.line)
        for variant, at in product(self.variants, self.places):
            shown = "" if variant is None else f" ({variant})"
            name = f"{self.name}{shown}: {at}"
            place = f"{getattr(self.changed, '__qualname__', self.name)}: {at}"
            yield Mutant(name, self.kind, place, partial(self.apply, at, variant), lines)


OPERATORS: list[Operator] = []


def operator(
    kind: str,
    *,
    changed: Any = None,
    line: str = "",
    variants: tuple[Any, ...] = (None,),
    units: tuple[str | None, ...] = UNITS,
    steps: tuple[int | None, ...] = (None,),
    ranks: tuple[int | None, ...] = (None,),
    micro_steps: tuple[int | None, ...] = (None,),
) -> Callable[[Apply], Apply]:
    """Register a function that makes a fault.

    Args:
        kind: Kind of the fault.
        changed: Function that is changed.
        line: Text of a line of that function; see :class:`Operator`.
        variants: Strengths or ways.
        units: Parameter groups, each in turn.
        steps: Numbers of optimizer steps before, each in turn.
        ranks: Ranks, each in turn.
        micro_steps: Numbers of micro-steps before in the window, each in turn.
    """

    def register(apply: Apply) -> Apply:
        places = tuple(At(*each) for each in product(units, steps, ranks, micro_steps))
        name = apply.__name__.replace("_", " ")
        OPERATORS.append(Operator(kind, name, apply, variants, places, changed, line))
        return apply

    return register


def operator_mutants() -> list[Mutant]:
    """The mutants of all operators at all places."""
    from benchmarks.certify import communicating, pending, storing, training  # noqa: F401  # they register theirs

    return [mutant for each in OPERATORS for mutant in each.mutants()]
