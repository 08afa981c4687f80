from __future__ import annotations

import pytest

from recipes.data.sources.text_source import is_held_out

ROWS = [f"row {number}" for number in range(300)]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_about_the_fraction_of_the_documents_is_held_out(fraction: float) -> None:
    held_out = [row for row in ROWS if is_held_out(row, fraction=fraction)]
    assert len(held_out) / 300 == pytest.approx(fraction, abs=0.06)


def test_a_larger_fraction_holds_out_more_of_the_same_documents() -> None:
    """So a document stays in its split whatever others there are."""
    tenth, half = ({row for row in ROWS if is_held_out(row, fraction=fraction)} for fraction in (0.1, 0.5))
    assert tenth < half


def test_text_that_is_no_unicode_has_a_split_too() -> None:
    assert is_held_out("\ud800", fraction=1.0)
