from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recipes.data.tokenizer import (
    END_OF_TEXT,
    SMALLEST_VOCAB,
    check_trained_vocab,
    encode,
    end_of_document,
    load_tokenizer,
    token_dtype,
    tokenizer_digest,
    train_tokenizer,
)
from recipes.data.vocabulary import vocabulary_of
from tests.support.small_tokenizers import saved, word_tokenizer

TEXTS = [f"def square_{n}(x):\n    return x * x  # größer {n}\n" for n in range(40)]


def test_a_trained_tokenizer_merges_and_gives_the_text_back() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokens = encode(tokenizer, TEXTS)
    assert [tokenizer.decode(each) for each in tokens] == TEXTS
    assert sum(map(len, tokens)) < 0.7 * len("".join(TEXTS).encode())
    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens(end_of_document(tokenizer)) == END_OF_TEXT
    assert None not in (tokenizer.mask_token_id, tokenizer.pad_token_id)


def test_a_tokenizer_is_loaded_from_a_folder_and_gives_no_tokens_around_a_text(tmp_path: Path) -> None:
    folder = saved(word_tokenizer(words=3), tmp_path / "words")
    assert encode(load_tokenizer(folder), ["w1 w0", "w2"]) == [[6, 5], [7]]
    assert (vocabulary_of(folder, 2048), vocabulary_of(None, 2048)) == (8, 2048)


def test_the_digest_tells_tokenizers_apart() -> None:
    three, again, four = (tokenizer_digest(word_tokenizer(words=words)) for words in (3, 3, 4))
    assert three == again != four


def test_a_tokenizer_without_threads_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    expected = encode(tokenizer, TEXTS)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode(tokenizer, TEXTS) == expected
    assert tokenizer_digest(tokenizer) != tokenizer_digest(word_tokenizer(words=3))


@pytest.mark.parametrize(("tokens", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_dtype_holds_every_token(tokens: int, dtype: type) -> None:
    assert token_dtype(tokens) == dtype
    assert np.iinfo(dtype).max >= tokens - 1


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.tokenizer={tmp_path} is neither a folder with a tokenizer nor a reachable name"
    ):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path: Path) -> None:
    folder = saved(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))), tmp_path / "words")
    with pytest.raises(ValueError, match="has neither an eos nor a sep token"):
        load_tokenizer(folder)


def test_a_vocabulary_that_has_no_room_for_bytes_is_refused() -> None:
    check_trained_vocab(SMALLEST_VOCAB)
    with pytest.raises(
        ValueError, match=r"data\.vocab_size=258 is less than 259: one token per byte, and <\|endoftext"
    ):
        check_trained_vocab(258)
