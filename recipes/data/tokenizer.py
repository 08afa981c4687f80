"""Tokenizers of ``transformers``: trained here, or loaded from a folder or the hub."""

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
    """Check that a trained tokenizer can have ``vocab_size`` tokens.

    Raises:
        ValueError: If it needs more.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"data.vocab_size={vocab_size} is less than {SMALLEST_VOCAB}: one token per byte, and {END_OF_TEXT}, "
            f"{MASK}, {PAD}"
        )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE.

    Args:
        texts: Texts to train on.
        vocab_size: Tokens of the tokenizer; it has fewer if the texts have no more pairs to merge.
    """
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
    """Load the tokenizer of a folder, or of a name on the hub.

    Args:
        name: Folder, or name on the hub.
        key: Key of the configuration that holds the name, for errors.

    Raises:
        ValueError: If there is none, or it has no token that can end a document.
    """
    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={name} is neither a folder with a tokenizer nor a reachable name on the hub: {error}"
        ) from error
    if end_of_document(tokenizer) is None:
        raise ValueError(f"{key}={name} has neither an eos nor a sep token, with which a document could end")
    return tokenizer


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that follows each document."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def token_dtype(tokens: int) -> np.dtype:
    """The smaller dtype, uint16 or uint32, that holds ``tokens`` different tokens."""
    return np.dtype(np.uint16 if tokens <= LARGEST_UINT16_VOCAB else np.uint32)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest that differs between tokenizers with different tokens."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps([tokenizer.name_or_path, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts on all cores, without special tokens around them.

    Args:
        tokenizer: Tokenizer.
        texts: Texts.
    """
    if tokenizer.is_fast:  # faster than `tokenizer(texts)`, which also computes offsets and masks
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
