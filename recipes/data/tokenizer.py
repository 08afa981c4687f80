"""Tokenizers of ``transformers``: one that is trained here, or one that has a name or a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"


SMALLEST_VOCAB = 256 + 3  # every byte, and the three above


LARGEST_UINT16_VOCAB = 2**16


def check_trained_vocab(vocab_size: int) -> None:
    """Raises ValueError if a tokenizer that is trained here cannot have so few tokens."""
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"data.vocab_size={vocab_size} is less than {SMALLEST_VOCAB}: one token per byte, and {END_OF_TEXT}, "
            f"{MASK}, {PAD}"
        )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of ``texts``; of fewer tokens than ``vocab_size`` if they have nothing more to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, mask_token=MASK, pad_token=PAD)


def load_tokenizer(name: str | Path, *, key: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a name on the hub.

    Raises:
        ValueError: If there is none, or it has no token that can end a document.
    """
    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={name} is neither a folder with a tokenizer nor a name on the hub that can be reached: {error}"
        ) from error
    if end_of_document(tokenizer) is None:
        raise ValueError(f"{key}={name} has neither an eos nor a sep token, with which a document could end")
    return tokenizer


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that is put after each document."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def token_dtype(tokens: int) -> np.dtype:
    """What holds the numbers of so many different tokens."""
    return np.dtype(np.uint16 if tokens <= LARGEST_UINT16_VOCAB else np.uint32)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Another for each tokenizer that gives other tokens."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps([tokenizer.name_or_path, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens around it, on all cores."""
    if tokenizer.is_fast:  # without the offsets and masks that `tokenizer(texts)` makes as well
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
