from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.data import tokenise
from recipes.data.sources.text_source import Piece, is_held_out
from recipes.data.tokenise import TokenFacts, fill_with_tokens
from recipes.data.tokenizer import END_OF_TEXT, load_tokenizer
from tests.support.tokenizers import word_tokenizer

SETTINGS: dict[str, Any] = {"tokenizer": None, "vocab_size": 300, "val_fraction": 0.2, "sample_bytes": 10**6}


class Documents:
    """Each comes in two pieces."""

    name, has_val = "documents", False

    def __init__(self, texts: list[str], *, size: int | None = None) -> None:
        self.texts, self.size, self.read = texts, size, 0

    def total_bytes(self) -> int | None:
        return self.size

    def pieces(self, split: str) -> Iterator[Piece]:
        for text in self.texts:
            for part, ends in ((text[:5], False), (text[5:], True)):
                self.read += 1
                yield Piece(part, document=text, ends=ends, read_bytes=len(part))


TEXTS = [f"document {number} says {number * number}" for number in range(60)]


def test_tokens_decode_to_the_documents_of_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 4)  # many small batches
    fill_with_tokens(tmp_path, Documents(TEXTS), **SETTINGS)
    facts, tokenizer = TokenFacts.read(tmp_path), load_tokenizer(tmp_path)
    assert facts.documents == 60
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / f"{split}.bin", dtype=facts.dtype)
        assert len(tokens) == getattr(facts, f"{split}_tokens") > 0
        expected = [text for text in TEXTS if is_held_out(text, fraction=0.2) == (split == "val")]
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == "".join(
            t + END_OF_TEXT for t in expected
        )


def test_a_given_tokenizer_is_used_and_kept(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(words=70000)
    fill_with_tokens(
        tmp_path, Documents(["w5 w1 w69999", "w3 w0 w2"]), **{**SETTINGS, "tokenizer": tokenizer, "val_fraction": 1e-9}
    )
    assert TokenFacts.read(tmp_path).dtype == "uint32"
    tokens = np.fromfile(tmp_path / "train.bin", dtype=np.uint32)
    assert 70004 in tokens.tolist() and tokens[-1] == tokenizer.sep_token_id
    assert len(load_tokenizer(tmp_path)) == 70005


@pytest.mark.parametrize(("size", "read"), [(None, 20), (10 * sum(map(len, TEXTS)), 120)])
def test_a_tokenizer_is_trained_on_a_bounded_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, read: int
) -> None:
    seen: list[str] = []

    def train(texts: Iterator[str], *, vocab_size: int) -> Any:
        seen.extend(texts)
        assert source.read <= read
        return word_tokenizer()

    source = Documents(TEXTS, size=size)
    monkeypatch.setattr(tokenise, "train_tokenizer", train)
    fill_with_tokens(tmp_path, source, **{**SETTINGS, "sample_bytes": 100})
    assert 0 < sum(map(len, seen)) < 150
    assert source.read > read  # and then all of it for the tokens


def test_if_all_documents_are_held_out_none_is(tmp_path: Path) -> None:
    text = next(text for text in TEXTS if is_held_out(text, fraction=0.2))
    fill_with_tokens(tmp_path, Documents([text]), **{**SETTINGS, "tokenizer": word_tokenizer()})
    facts = TokenFacts.read(tmp_path)
    assert facts.train_tokens > 0 and facts.val_tokens == 0


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the source 'documents' holds no text"):
        fill_with_tokens(tmp_path, Documents([]), **SETTINGS)
