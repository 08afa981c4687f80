"""Streaming tokenization of a source of text: memory does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor
from typing import Any

import numpy as np
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from recipes.data.sources.text_source import Piece, TextSource, is_held_out
from recipes.data.tokenizer import encode, end_of_document, token_dtype, train_tokenizer

PIECES_AT_ONCE = 128  # enough for every core, and few enough for their lists of Python integers


def tokenizer_of(
    source: TextSource, *, vocab_size: int, val_fraction: float, sample_bytes: int
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the training documents of ``source``.

    Args:
        source: Source of the text.
        vocab_size: Tokens of the tokenizer, at most.
        val_fraction: Fraction of the documents that is held out, for a source without a split of its own.
        sample_bytes: Bytes of text to train on, evenly spread if the source knows its size, else the first ones.
    """
    share = min(1.0, sample_bytes / max(1, source.total_bytes() or 1))

    def sample() -> Iterator[str]:
        taken = 0
        documents = source.pieces("train")
        pieces = (piece for piece in documents if not _held_out(source, piece, val_fraction=val_fraction))
        for number, piece in enumerate(pieces):
            if floor(number * share) > floor((number - 1) * share):
                yield piece["text"]
                taken += len(piece["text"].encode(errors="surrogatepass"))
                if taken >= sample_bytes:
                    return

    return train_tokenizer(sample(), vocab_size=vocab_size)


def token_rows(
    source: TextSource, *, tokenizer: PreTrainedTokenizerBase, val_fraction: float
) -> Iterator[dict[str, np.ndarray]]:
    """The tokens of ``source``, a row for each piece: ``{"train": [tokens], "val": [tokens]}``, one of them empty.

    Args:
        source: Source of the text.
        tokenizer: Tokenizer; its token for the end of a document follows each document.
        val_fraction: Fraction of the documents that is held out, for a source without a split of its own.

    Raises:
        ValueError: If the source has no text at all.
    """
    none = np.empty(0, dtype=token_dtype(len(tokenizer)))
    empty = True
    for split in ("train", "val") if source.has_val else ("train",):
        pieces = IterableDataset.from_generator(source.pieces, gen_kwargs={"split": split})
        tokenized = pieces.map(tokenize, batched=True, batch_size=PIECES_AT_ONCE, fn_kwargs={"tokenizer": tokenizer})
        for row in tokenized:
            empty = False
            if split == "val" or _held_out(source, row, val_fraction=val_fraction):
                yield {"train": none, "val": row["tokens"]}
            else:
                yield {"train": row["tokens"], "val": none}
    if empty:
        raise ValueError(f"the source {source.name!r} holds no text: it has no documents, or all of them are empty")


def tokenize(pieces: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[np.ndarray]]:
    """Tokenize a batch of pieces, adding the end-of-document token where a document ends.

    Args:
        pieces: Lists of the fields of :class:`~recipes.data.sources.text_source.Piece`.
        tokenizer: Tokenizer.

    Returns:
        Tokens ``[tokens]`` of each piece, as "tokens".
    """
    dtype, end = token_dtype(len(tokenizer)), end_of_document(tokenizer)
    encoded = encode(tokenizer, pieces["text"])
    endings = [[end] if ends else [] for ends in pieces["ends"]]
    return {"tokens": [np.array(ids + ending, dtype=dtype) for ids, ending in zip(encoded, endings, strict=True)]}


def _held_out(source: TextSource, piece: Piece, *, val_fraction: float) -> bool:
    return not source.has_val and is_held_out(piece["document"], fraction=val_fraction)
