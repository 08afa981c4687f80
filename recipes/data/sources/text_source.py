"""The interface of all sources of text, and the choice of documents that are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol, TypedDict

PIECE_CHARACTERS = 2**16  # size of the pieces of a long document, so that no process holds all of it


class Piece(TypedDict):
    """A document, or a part of one; the parts of a document follow each other.

    Attributes:
        text: Characters, at least one.
        document: Identity of the document: a name or, if it has none, its text.
        ends: Whether the document ends here.
    """

    text: str
    document: str
    ends: bool


class TextSource(Protocol):
    """Documents from somewhere.

    Attributes:
        name: Short name, part of the name of the folder with the tokens.
        has_val: Whether the source has documents for validation of its own.
    """

    name: str
    has_val: bool

    def facts(self) -> Any:
        """Everything that the text depends on, serializable as JSON; cheap, because every rank calls it.

        Raises:
            FileNotFoundError: If the source does not exist.
        """

    def total_bytes(self) -> int | None:
        """Bytes to read, both splits together; None if unknown before reading."""

    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents of ``"train"`` or, if the source has them, ``"val"``, always in the same order."""


def is_held_out(document: str, *, fraction: float) -> bool:
    """Whether a document is one of the ``fraction`` for validation.

    The SHA-256 of its identity decides, so that the choice does not depend on other documents, and equal documents are
    in the same split.

    Args:
        document: Identity of the document.
        fraction: Fraction of the documents to hold out, 0 to 1.
    """
    digest = hashlib.sha256(document.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
