"""One line of a report."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mics.certification.differences import Difference


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        run: Which training, in words.
        what: What was compared.
        compared: Number of values or tensors.
        worst: Largest difference as a multiple of the allowed one, with where it is.
        first: First difference that rounding does not explain; None if there is none.
    """

    run: str
    what: str
    compared: int
    worst: Difference
    first: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether rounding explains all of it."""
        return self.first is None
