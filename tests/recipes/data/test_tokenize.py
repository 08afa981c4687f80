from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from recipes.data import tokenize
from recipes.data.sources.text_source import Piece, is_held_out
from recipes.data.tokenize import token_rows, tokenizer_of
from tests.support.small_tokenizers import word_tokenizer

TEXTS = [f"document {number} says {number * number}" for number in range(60)]
SAMPLE = {"vocab_size": 300, "val_fraction": 0.2, "sample_bytes": 10**6}


class Documents:
    """Each comes in two pieces."""

    name = "documents"

    def __init__(self, texts: list[str], *, size: int | None = None, val: list[str] | None = None) -> None:
        self.has_val = val is not None
        self.texts, self.size, self.read = {"train": texts, "val": val}, size, 0

    def total_bytes(self) -> int | None:
        return self.size

    def pieces(self, split: str) -> Iterator[Piece]:
        for text in self.texts[split]:
            for part, ends in ((text[:5], False), (text[5:], True)):
                self.read += 1
                yield Piece(text=part, document=text, ends=ends)


def tokens(source: Documents, split: str, **options: Any) -> np.ndarray:
    return np.concatenate([row[split] for row in token_rows(source, **{"val_fraction": 0.2, **options})])


def test_tokens_decode_to_the_documents_of_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PIECES_AT_ONCE", 7)  # batches that end within documents
    tokenizer = tokenizer_of(Documents(TEXTS), **SAMPLE)
    for split in ("train", "val"):
        made = tokens(Documents(TEXTS), split, tokenizer=tokenizer)
        expected = [text for text in TEXTS if is_held_out(text, fraction=0.2) == (split == "val")]
        assert 0 < len(expected) < 60 and made.dtype == np.uint16
        assert tokenizer.decode(made.tolist(), skip_special_tokens=False) == "".join(
            text + tokenizer.eos_token for text in expected
        )


def test_a_source_with_a_split_of_its_own_holds_out_nothing_else() -> None:
    tokenizer = tokenizer_of(Documents(TEXTS), **SAMPLE)
    source = Documents(TEXTS, val=["held out"])
    for split, expected in (("train", TEXTS), ("val", ["held out"])):
        made = tokens(source, split, tokenizer=tokenizer)
        assert tokenizer.decode(made.tolist()) == "".join(text + tokenizer.eos_token for text in expected)


def test_a_large_vocabulary_takes_wider_tokens() -> None:
    tokenizer = word_tokenizer(words=70000)
    made = tokens(Documents(["w5 w1 w69999", "w3 w0 w2"]), "train", tokenizer=tokenizer, val_fraction=1e-9)
    assert made.dtype == np.uint32
    assert 70004 in made.tolist() and made[-1] == tokenizer.sep_token_id


@pytest.mark.parametrize(("size", "read"), [(None, 20), (10 * sum(map(len, TEXTS)), 120)])
def test_a_tokenizer_is_trained_on_a_bounded_sample(
    monkeypatch: pytest.MonkeyPatch, size: int | None, read: int
) -> None:
    """The first documents of a source of unknown size; else evenly spread ones, of all that are not held out."""
    seen: list[str] = []
    monkeypatch.setattr(tokenize, "train_tokenizer", lambda texts, *, vocab_size: seen.extend(texts))
    source = Documents(TEXTS, size=size)
    tokenizer_of(source, **{**SAMPLE, "sample_bytes": 100})
    assert 0 < sum(map(len, seen)) < 150
    assert source.read <= read
    held_out = [text for text in TEXTS if is_held_out(text, fraction=0.2)]
    assert not any(part in (text[:5], text[5:]) for text in held_out for part in seen if part != "docum")
    assert (source.read > 100) == (size is not None)


def test_a_source_without_text_is_rejected() -> None:
    with pytest.raises(ValueError, match="the source 'documents' holds no text"):
        list(token_rows(Documents([]), tokenizer=word_tokenizer(), val_fraction=0.2))
