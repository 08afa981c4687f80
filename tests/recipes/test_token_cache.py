from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from recipes.token_cache import END_OF_TEXT, cache_folder, load_tokenizer, load_tokens, prepare_tokens

TEXTS = [f"def square_{n}(x):\n    return x * x  # größer {n}\n" for n in range(40)]
SIZES = {"vocab_size": 300, "train_texts": TEXTS[4:], "val_texts": TEXTS[:4]}


def test_tokens_decode_to_the_texts_they_came_from(tmp_path: Path) -> None:
    prepare_tokens(tmp_path / "cache", **SIZES)
    tokenizer = load_tokenizer(tmp_path / "cache")
    for split in ("train", "val"):
        tokens = load_tokens(tmp_path / "cache", split)
        assert tokens.dtype == np.uint16
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        assert text == "".join(text + END_OF_TEXT for text in SIZES[f"{split}_texts"])
    assert len(tokens) < len("".join(TEXTS[:4]))  # the BPE merged something


def test_two_preparations_at_once_leave_one_good_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = context.Barrier(2)

    def prepare() -> None:
        both.wait()
        prepare_tokens(tmp_path / "cache", **SIZES)

    processes = [context.Process(target=prepare) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert len(load_tokens(tmp_path / "cache", "train")) > 0
    assert load_tokenizer(tmp_path / "cache").get_vocab_size() <= 300


def test_a_second_preparation_keeps_the_first(tmp_path: Path) -> None:
    prepare_tokens(tmp_path / "cache", **SIZES)
    prepare_tokens(tmp_path / "cache", vocab_size=300, train_texts=TEXTS[:2], val_texts=[])
    assert len(load_tokens(tmp_path / "cache", "val")) > 0


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        prepare_tokens(tmp_path / "cache", vocab_size=300, train_texts=TEXTS, val_texts=[None])
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_depends_on_every_setting(tmp_path: Path) -> None:
    settings = (["3.11", 300], ["3.12", 300], ["3.11", 400])
    folders = {cache_folder(tmp_path, name="text", depends_on=setting) for setting in settings}
    assert len(folders) == 3
    assert cache_folder(tmp_path, name="text", depends_on=["3.11", 300]) in folders


@pytest.mark.parametrize("vocab_size", [256, 65537])
def test_a_vocabulary_that_bytes_or_uint16_cannot_have_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is not between 257 .* and 65536"):
        prepare_tokens(tmp_path / "cache", vocab_size=vocab_size, train_texts=TEXTS, val_texts=TEXTS)
