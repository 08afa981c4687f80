"""What every source of text offers, and which of its documents are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_CHARACTERS = 2**16  # a long document comes in pieces of about this size, so that nobody holds all of it


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one; the parts of a document follow each other.

    Attributes:
        text: Not empty.
        document: What tells its document from others: a name or, if it has none, its text.
        ends: Whether the document ends here.
        read_bytes: How much of the source's ``total_bytes`` it took, for a progress bar.
    """

    text: str
    document: str
    ends: bool = True
    read_bytes: int = 0


class TextSource(Protocol):
    """Documents from somewhere.

    Attributes:
        name: Short; part of the name of the folder that the tokens are kept in.
        has_val: Whether it brings documents for validation of its own.
    """

    name: str
    has_val: bool

    def facts(self) -> Any:
        """All that its text depends on, as json can write it; cheap, for every rank asks.

        Raises:
            FileNotFoundError: If there is nothing where it should be.
        """

    def total_bytes(self) -> int | None:
        """How much there is to read, both splits together; None if that is not known before."""

    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents of ``"train"`` or, if it has them, ``"val"``, always in the same order."""


def labelled_pieces(source: TextSource, *, val_fraction: float) -> Iterator[tuple[str, Piece]]:
    """All pieces of ``source``, each with the split it belongs to.

    Unless the source has a split of its own, about ``val_fraction`` of the documents are held out, by the SHA-256 of
    what tells them apart: the same ones whatever else is there, and never one row of two equal ones.
    """
    for piece in source.pieces("train"):
        held_out = not source.has_val and is_held_out(piece.document, fraction=val_fraction)
        yield ("val" if held_out else "train"), piece
    if source.has_val:
        for piece in source.pieces("val"):
            yield "val", piece


def is_held_out(document: str, *, fraction: float) -> bool:
    """Whether a document is one of the ``fraction`` for validation."""
    digest = hashlib.sha256(document.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
