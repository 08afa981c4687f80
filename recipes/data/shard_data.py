"""Data that is already tokenized: flat files of tokens, memory-mapped in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipes.data.masked_windows import check_mask_token
from recipes.data.sources.file_patterns import matching_files
from recipes.data.text_data import check_vocab_size
from recipes.data.token_data import TokenData, split_tail
from recipes.data.tokenizer import LARGEST_UINT16_VOCAB, load_tokenizer

CHECKED_TOKENS = 2**20  # at each end of a file: reading all of a large corpus would take too long


class ShardData(TokenData):
    """Token windows of files that consist of tokens only.

    Args:
        train_files: Paths or patterns.
        val_files: Paths or patterns; None takes the last ``val_fraction`` of the training tokens.
        dtype: Type of the tokens, ``"uint16"`` or ``"uint32"``, in the byte order of this machine.
        tokenizer: Tokenizer that made the tokens: a folder or a name on the hub.
        vocab_size: Size of the vocabulary.
        windows: Further arguments of :class:`~recipes.data.token_data.TokenData`.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If files, dtype, vocabulary, tokenizer and objective do not fit each other.
    """

    def __init__(
        self,
        *,
        train_files: str | Sequence[str],
        tokenizer: str | None,
        vocab_size: int,
        val_files: str | Sequence[str] | None = None,
        dtype: str = "uint16",
        **windows: Any,
    ) -> None:
        super().__init__(vocab_size=vocab_size, **windows)
        if tokenizer is None:
            raise ValueError(
                "data.tokenizer is not given; name the tokenizer that made the tokens, by folder or hub name"
            )
        _check_dtype(dtype, vocab_size=vocab_size)
        self.dtype = np.dtype(dtype)
        self.train_files = matching_files(train_files, key="data.train_files")
        self.val_files = [] if val_files is None else matching_files(val_files, key="data.val_files")
        for path in self.train_files + self.val_files:
            self._check_size(path)
        self.tokenizer_name = tokenizer
        self.given_tokenizer = load_tokenizer(tokenizer)
        check_vocab_size(self.given_tokenizer, vocab_size=vocab_size)
        if self.objective == "masked":
            check_mask_token(self.given_tokenizer)

    @property
    def tokenizer_folder(self) -> Path | None:
        folder = Path(self.tokenizer_name).expanduser()
        return folder if folder.is_dir() else None

    def _check_size(self, path: Path) -> None:
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes: not tokens of {self.dtype.itemsize} bytes each; is "
                f"data.dtype={self.dtype} right?"
            )

    def prepare(self) -> None:
        for path in self.train_files + self.val_files:
            tokens = np.memmap(path, dtype=self.dtype, mode="r")
            for part in (tokens[:CHECKED_TOKENS], tokens[-CHECKED_TOKENS:]):
                check_tokens(part, vocab_size=self.vocab_size, where=path)

    def open(self) -> tuple[PreTrainedTokenizerBase, list[np.ndarray], list[np.ndarray]]:
        train, val = (
            [np.memmap(path, dtype=self.dtype, mode="r") for path in paths]
            for paths in (self.train_files, self.val_files)
        )
        if not val:
            train, val = split_tail(train, fraction=self.val_fraction)
        return self.given_tokenizer, train, val


def check_tokens(tokens: np.ndarray, *, vocab_size: int, where: Path) -> None:
    """Check that tokens fit the vocabulary and the dtype.

    Args:
        tokens: Tokens ``[tokens]``.
        vocab_size: Size of the vocabulary.
        where: File with the tokens, for errors.

    Raises:
        ValueError: If they do not fit.
    """
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"{where} holds token {tokens.max()} but data.vocab_size={vocab_size} allows at most {vocab_size - 1}; "
            f"is data.dtype={tokens.dtype} right?"
        )
    if tokens.dtype == np.uint16 and len(tokens) > 64 and not tokens[1::2].any():  # like small numbers in 4 bytes
        raise ValueError(f"every second token of {where} is 0: it looks like uint32, not data.dtype={tokens.dtype}")


def _check_dtype(dtype: str, *, vocab_size: int) -> None:
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"data.dtype={dtype} is neither uint16 nor uint32")
    if dtype == "uint16" and vocab_size > LARGEST_UINT16_VOCAB:
        raise ValueError(
            f"data.dtype=uint16 cannot hold the tokens of data.vocab_size={vocab_size}: at most "
            f"{LARGEST_UINT16_VOCAB} fit; use data.dtype=uint32"
        )
