"""Texts to tokens, once: a byte-level BPE is trained, and it and the tokens are kept in one folder per setting.

    FOLDER/tokenizer.json   FOLDER/train.bin   FOLDER/val.bin      (tokens: uint16, end to end)

A folder appears complete or not at all: it is written under another name and renamed. Of several processes that prepare
the same one at once, the first to finish wins and the others drop theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 256 + 1  # every byte, and END_OF_TEXT
LARGEST_VOCAB = 2**16  # what uint16 holds


def cache_folder(cache_dir: str | Path, *, name: str, depends_on: Any) -> Path:
    """The folder for tokens that are determined by ``depends_on`` (anything that json can write)."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir).expanduser() / f"{name}-{digest[:16]}"


def prepare_tokens(folder: Path, *, train_texts: Sequence[str], val_texts: Sequence[str], vocab_size: int) -> None:
    """Fill ``folder``: a BPE trained on ``train_texts``, and the tokens of both, each text followed by ``END_OF_TEXT``.

    Raises:
        ValueError: If ``vocab_size`` is not one that bytes need and uint16 holds.
    """
    if not SMALLEST_VOCAB <= vocab_size <= LARGEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is not between {SMALLEST_VOCAB} (one token per byte and {END_OF_TEXT}) "
            f"and {LARGEST_VOCAB} (tokens are stored as uint16)"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as unfinished:
        draft = Path(unfinished, "draft")
        draft.mkdir()
        tokenizer = _train_tokenizer(train_texts, vocab_size=vocab_size)
        tokenizer.save(str(draft / "tokenizer.json"))
        for split, texts in (("train", train_texts), ("val", val_texts)):
            _encode(tokenizer, texts).tofile(draft / f"{split}.bin")
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():  # it is one if another process was first
                raise


def load_tokenizer(folder: Path) -> Tokenizer:
    """The BPE of a prepared folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_tokens(folder: Path, split: str) -> np.ndarray:
    """The tokens ``[tokens]`` of ``"train"`` or ``"val"``, mapped: all ranks of a machine share one copy."""
    return np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")


def _train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str], *, texts_at_once: int = 64) -> np.ndarray:
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.empty(0, dtype=np.uint16)]
    for first in range(0, len(texts), texts_at_once):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + texts_at_once]):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)
