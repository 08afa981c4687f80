"""From a source of text to one folder of tokens, written as they come: memory does not grow with the corpus.

FOLDER/train.bin  FOLDER/val.bin    tokens end to end, uint16 or uint32
FOLDER/facts.json                   dtype and counts
FOLDER/tokenizer.json ...           the tokenizer, as ``save_pretrained`` writes it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_mics.checkpoint.storage.progress import progress_bar
from recipes.data.sources.text_source import PIECE_CHARACTERS, Piece, TextSource, labelled_pieces
from recipes.data.tokenizer import encode, end_of_document, token_dtype, train_tokenizer

FACTS = "facts.json"


@dataclass(frozen=True)
class TokenFacts:
    """What is in a folder of tokens.

    Attributes:
        dtype: Of the tokens.
        train_tokens: How many there are to train on.
        val_tokens: How many are held out; 0 if no document was, and the end of the training tokens must serve.
        documents: Of both.
    """

    dtype: str
    train_tokens: int
    val_tokens: int
    documents: int

    @classmethod
    def read(cls, folder: Path) -> TokenFacts:
        return cls(**json.loads((folder / FACTS).read_text()))


def fill_with_tokens(
    folder: Path,
    source: TextSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    val_fraction: float,
    sample_bytes: int,
) -> None:
    """Write the tokens of ``source``, and the tokenizer that made them, to ``folder``.

    Args:
        folder: Exists, and is empty.
        source: Of the text.
        tokenizer: None trains one.
        vocab_size: Of the one that is trained.
        val_fraction: Of the documents, for a source without a split of its own.
        sample_bytes: Of text to train a tokenizer on; more makes it hardly better, but slower.

    Raises:
        ValueError: If there is no text at all.
    """
    if tokenizer is None:
        texts = _training_sample(source, val_fraction=val_fraction, sample_bytes=sample_bytes)
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    tokenizer.save_pretrained(folder)
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in ("train", "val")}
        documents = _write_tokens(files, source, tokenizer=tokenizer, val_fraction=val_fraction)
    if documents == 0:
        raise ValueError(f"the source {source.name!r} holds no text: all of its documents are empty, or it has none")
    _keep_some_for_training(folder, has_val=source.has_val)
    dtype = token_dtype(len(tokenizer))
    counts = {f"{split}_tokens": _size(folder, split) // dtype.itemsize for split in ("train", "val")}
    (folder / FACTS).write_text(json.dumps(asdict(TokenFacts(dtype=dtype.name, documents=documents, **counts))))


def _training_sample(source: TextSource, *, val_fraction: float, sample_bytes: int) -> Iterator[str]:
    """Pieces for a tokenizer, evenly spread where the source knows its size, else the first ones."""
    share = min(1.0, sample_bytes / max(1, source.total_bytes() or 1))
    texts = (piece for split, piece in labelled_pieces(source, val_fraction=val_fraction) if split == "train")
    chosen = (piece for number, piece in enumerate(texts) if floor(number * share) > floor((number - 1) * share))
    taken = 0
    for piece in chosen:
        yield piece.text
        taken += piece.read_bytes
        if taken >= sample_bytes:
            return


def _write_tokens(
    files: dict[str, IO[bytes]], source: TextSource, *, tokenizer: PreTrainedTokenizerBase, val_fraction: float
) -> int:
    """Write each split's tokens to its file; returns the number of documents."""
    dtype, end, documents = token_dtype(len(tokenizer)), end_of_document(tokenizer), 0
    pieces = labelled_pieces(source, val_fraction=val_fraction)
    with progress_bar(f"tokenising {source.name}", total_bytes=source.total_bytes(), enabled=True) as advance:
        for batch in _batches(pieces):
            for (split, piece), tokens in zip(batch, encode(tokenizer, [p.text for _, p in batch]), strict=True):
                ending = [end] if piece.ends else []
                files[split].write(np.array([*tokens, *ending], dtype=dtype).tobytes())
                documents += piece.ends
                advance(piece.read_bytes)
    return documents


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces in lists that give every core some to do at once."""
    batch_characters = PIECE_CHARACTERS * max(8, 4 * (os.cpu_count() or 1))
    batch: list[tuple[str, Piece]] = []
    characters = 0
    for split, piece in pieces:
        batch.append((split, piece))
        characters += len(piece.text)
        if characters >= batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _keep_some_for_training(folder: Path, *, has_val: bool) -> None:
    """Of very few documents all may have been held out; then the end of all tokens must serve, as if none had been."""
    if _size(folder, "train") == 0 and not has_val:
        os.replace(folder / "val.bin", folder / "train.bin")
        (folder / "val.bin").touch()


def _size(folder: Path, split: str) -> int:
    return (folder / f"{split}.bin").stat().st_size
