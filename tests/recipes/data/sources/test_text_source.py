from __future__ import annotations

from collections.abc import Iterator

import pytest

from recipes.data.sources.text_source import Piece, is_held_out, labelled_pieces


class Rows:
    name = "rows"

    def __init__(self, *, val: list[str] | None = None) -> None:
        self.has_val = val is not None
        self._rows = {"train": [f"row {number}" for number in range(300)] + ["row 7"], "val": val}

    def pieces(self, split: str) -> Iterator[Piece]:
        return (Piece(row, document=row) for row in self._rows[split])


def held_out(source: Rows, *, val_fraction: float = 0.1) -> list[str]:
    return [piece.text for split, piece in labelled_pieces(source, val_fraction=val_fraction) if split == "val"]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_about_the_fraction_of_the_documents_is_held_out(fraction: float) -> None:
    assert len(held_out(Rows(), val_fraction=fraction)) / 301 == pytest.approx(fraction, abs=0.06)


def test_a_document_stays_in_its_split_and_equal_ones_in_one() -> None:
    rows = Rows()
    assert held_out(rows) == held_out(rows)
    both = {True: held_out(rows), False: [row for row in rows._rows["train"] if row not in held_out(rows)]}
    assert both[is_held_out("row 7", fraction=0.1)].count("row 7") == 2


def test_a_source_with_a_split_of_its_own_holds_out_nothing_else() -> None:
    assert held_out(Rows(val=["a", "b"])) == ["a", "b"]
