"""Text from a source, tokenised once and kept in a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.data.masked_windows import check_mask_token
from recipes.data.sources.text_source import TextSource
from recipes.data.token_cache import cache_folder, prepare_once
from recipes.data.token_data import TokenData, split_tail
from recipes.data.tokenise import TokenFacts, fill_with_tokens
from recipes.data.tokenizer import check_trained_vocab, load_tokenizer, tokenizer_digest

FORMAT = 2  # of the folder; another number makes all be tokenised anew


class TextData(TokenData):
    """Token windows of a source of text.

    The tokens are made by one process, on whichever machine is first, and kept under ``cache_dir``: in a folder that
    all nodes share, once for all; in one that each node has for itself, once on each.

    Args:
        source: Of the text; see :class:`~recipes.data.sources.text_source.TextSource`.
        tokenizer: A folder or a name on the hub; None trains a byte-level BPE of ``vocab_size`` tokens.
        vocab_size: Of the BPE, or at least the tokens that ``tokenizer`` has.
        cache_dir: Where tokenizer and tokens are kept between runs.
        tokenizer_sample_mb: How much text a BPE is trained on, if there is more.
        windows: See :class:`~recipes.data.token_data.TokenData`.

    Raises:
        FileNotFoundError: If the source has nothing where it should be.
        ValueError: If tokenizer, ``vocab_size`` and objective do not fit each other.
    """

    def __init__(
        self,
        *,
        source: TextSource,
        vocab_size: int,
        tokenizer: str | None = None,
        cache_dir: str = "~/.cache/lightning_mics",
        tokenizer_sample_mb: float = 64,
        **windows: Any,
    ) -> None:
        super().__init__(vocab_size=vocab_size, **windows)
        self.source = source
        self.tokenizer_sample_bytes = int(tokenizer_sample_mb * 1e6)
        self.given_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self._check_tokenizer()
        depends_on = [FORMAT, source.facts(), self.val_fraction, *self._tokenizer_facts()]
        self.folder = cache_folder(cache_dir, name=source.name, depends_on=depends_on)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder

    def _check_tokenizer(self) -> None:
        if self.given_tokenizer is None:
            check_trained_vocab(self.vocab_size)
            return
        check_vocab_size(self.given_tokenizer, vocab_size=self.vocab_size)
        if self.objective == "masked":
            check_mask_token(self.given_tokenizer)

    def _tokenizer_facts(self) -> list[Any]:
        if self.given_tokenizer is None:
            return [self.vocab_size, self.tokenizer_sample_bytes]
        return [tokenizer_digest(self.given_tokenizer)]

    def prepare(self) -> None:
        prepare_once(self.folder, self._fill)

    def _fill(self, draft: Path) -> None:
        how = f"with a tokenizer of {self.vocab_size} tokens, to be trained" if self.given_tokenizer is None else ""
        print(f"Tokenising {self.source.name} once {how}: {self.folder}", flush=True)
        begun = time.perf_counter()
        fill_with_tokens(
            draft,
            self.source,
            tokenizer=self.given_tokenizer,
            vocab_size=self.vocab_size,
            val_fraction=self.val_fraction,
            sample_bytes=self.tokenizer_sample_bytes,
        )
        facts = TokenFacts.read(draft)
        print(
            f"Tokenised {facts.documents:,} documents in {time.perf_counter() - begun:.1f} s: {facts.train_tokens:,} "
            f"tokens for training, {facts.val_tokens:,} for validation",
            flush=True,
        )

    def open(self) -> tuple[PreTrainedTokenizerBase, list[np.ndarray], list[np.ndarray]]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is not there, though it was prepared: do all nodes see the same source, with the same "
                "times of change? If not, let data.cache_dir be a folder that each node has for itself"
            )
        facts = TokenFacts.read(self.folder)
        train, val = ([load_tokens(self.folder / f"{split}.bin", facts.dtype)] for split in ("train", "val"))
        if facts.val_tokens == 0:
            train, val = split_tail(train, fraction=self.val_fraction)
        return AutoTokenizer.from_pretrained(str(self.folder)), train, val


def check_vocab_size(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer has more tokens than that."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is less than the {len(tokenizer)} tokens of data.tokenizer="
            f"{tokenizer.name_or_path}; use data.vocab_size={len(tokenizer)}"
        )


def load_tokens(path: Path, dtype: str) -> np.ndarray:
    """The tokens ``[tokens]`` of a file, mapped; nothing can be mapped of an empty one."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
