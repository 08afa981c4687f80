from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.data.shard_data import ShardData
from tests.support.small_tokenizers import saved, word_tokenizer

WINDOWS = {"sequence_length": 8, "batch_size": 2, "val_batch_size": 4, "val_windows": 8, "prompt": "w1 w2"}


def shards(folder: Path, *, stored: str = "uint16", parts: int = 3, **options: Any) -> ShardData:
    """Files of the tokens 5, 6, ... 64, 5, 6, ..."""
    for part in range(parts):
        (5 + np.arange(part * 1000, (part + 1) * 1000) % 60).astype(stored).tofile(folder / f"{part}.bin")
    given = {"train_files": f"{folder}/*.bin", "tokenizer": saved(word_tokenizer(), folder / "words"), "vocab_size": 65}
    return ShardData(**{**given, **WINDOWS, **options})


def opened(data: ShardData) -> ShardData:
    data.prepare_data()
    data.setup("validate")
    return data


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_tail_of_all_files_is_held_out(tmp_path: Path, dtype: str) -> None:
    data = opened(shards(tmp_path, stored=dtype, dtype=dtype, val_fraction=0.5))
    assert len(data.train) == 124 + 62  # of files of 1000 and 500 tokens
    assert len(data.val) == 8
    assert all(((window[1:] - window[:-1] - 1) % 60 == 0).all() for window in data.train)
    assert data.train_tokens.dtype == dtype and isinstance(data.train_tokens, np.memmap)
    assert data.decode(torch.tensor([6, 7])) == "w1 w2"
    assert data.tokenizer_folder == tmp_path / "words"


def test_named_files_are_for_validation(tmp_path: Path) -> None:
    data = opened(shards(tmp_path, train_files=f"{tmp_path}/[01].bin", val_files=[f"{tmp_path}/2.bin"]))
    assert len(data.train) == 2 * 124
    assert data.val_tokens[0] == 5 + 2000 % 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int32"}, r"data\.dtype=int32 is neither uint16 nor uint32"),
        ({"vocab_size": 70000}, r"uint16 cannot hold the tokens of data\.vocab_size=70000: at most 65536 fit"),
        ({"vocab_size": 60}, r"data\.vocab_size=60 is less than the 65 tokens of data\.tokenizer="),
        ({"tokenizer": None}, r"data\.tokenizer is not given; name the tokenizer that made the tokens"),
        ({"objective": "both"}, r"objective='both' is neither 'causal' nor 'masked'"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 is not between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shards(tmp_path, **options)


def test_a_masked_model_needs_a_mask(tmp_path: Path) -> None:
    tokenizer = saved(word_tokenizer(mask=False), tmp_path / "no_mask")
    with pytest.raises(ValueError, match=r"no_mask has no mask token"):
        shards(tmp_path, tokenizer=tokenizer, objective="masked")


def test_shards_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train_files=.*\*\.npy matches no file"):
        shards(tmp_path, train_files=f"{tmp_path}/*.npy")
    with pytest.raises(FileNotFoundError, match=r"data\.val_files=.*\*\.npy matches no file"):
        shards(tmp_path, val_files=f"{tmp_path}/*.npy")


@pytest.mark.parametrize("content", [b"", b"odd"])
def test_a_size_that_is_no_number_of_tokens_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.bin has {len(content)} bytes: not tokens of 2 bytes each"):
        shards(tmp_path)


@pytest.mark.parametrize(
    ("stored", "said", "message"),
    [
        (
            "uint16",
            "uint32",
            r"0\.bin holds token \d+ but data\.vocab_size=65 allows at most 64; is data\.dtype=uint32",
        ),
        ("uint32", "uint16", r"every second token of .*0\.bin is 0: it looks like uint32, not data\.dtype=uint16"),
    ],
)
def test_a_dtype_that_is_not_that_of_the_files_is_noticed(tmp_path: Path, stored: str, said: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(shards(tmp_path, stored=stored, dtype=said))
