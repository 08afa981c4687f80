"""Text from a source, tokenized once and cached in a folder by ``datasets``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.data.masked_windows import check_mask_token
from recipes.data.sources.text_source import TextSource
from recipes.data.token_data import TokenData, split_tail
from recipes.data.tokenize import token_rows, tokenizer_of
from recipes.data.tokenizer import check_trained_vocab, load_tokenizer, token_dtype, tokenizer_digest

FORMAT = 3  # version of the folder's content; tokens of another version are not used


class TextData(TokenData):
    """Token windows of a source of text.

    The first process tokenizes while the others wait for its lock. The tokens are a dataset of ``datasets`` under
    ``cache_dir``, written atomically and memory-mapped by all ranks. In a folder that all nodes share, text is
    tokenized once in all; in a local folder, once on each node::

        CACHE_DIR/NAME-DIGEST/tokenizer.json ...    the tokenizer, as ``save_pretrained`` writes it
        CACHE_DIR/NAME-DIGEST/generator/...         the tokens, as ``Dataset.from_generator`` writes them

    Args:
        source: Source of the text; see :class:`~recipes.data.sources.text_source.TextSource`.
        tokenizer: A folder or a name on the hub; None trains a byte-level BPE of ``vocab_size`` tokens.
        vocab_size: Tokens of the BPE; at least as many as ``tokenizer`` has.
        cache_dir: Folder for tokenizers and tokens, reused between runs.
        tokenizer_sample_mb: Megabytes of text to train a BPE on, at most.
        windows: Further arguments of :class:`~recipes.data.token_data.TokenData`.

    Raises:
        FileNotFoundError: If the source does not exist.
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
        self._digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir).expanduser() / f"{source.name}-{self._digest}"

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
        if not any(self.folder.rglob("dataset_info.json")):
            print(
                f"{self.folder} does not exist yet: creating it, or waiting for another process that does", flush=True
            )
        self._stored(self._tokenize)

    def _stored(self, rows: Callable[[], Iterator[dict[str, np.ndarray]]]) -> Dataset:
        """The dataset of the folder, created from ``rows`` if it does not exist."""
        column = List(Value(self._dtype.name))
        features = Features({"train": column, "val": column})
        try:
            stored = Dataset.from_generator(
                rows, features=features, cache_dir=str(self.folder), fingerprint=self._digest
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # an error of the file system, not of the content of files
                raise
            raise self._corrupted(str(error)) from error
        expected = stored.info.splits["train"].num_examples
        if len(stored) != expected:
            raise self._corrupted(f"{len(stored)} rows of {expected}")
        return stored

    def _corrupted(self, what: str) -> ValueError:
        return ValueError(f"{self.folder} is corrupted ({what}); delete it to tokenize again")

    @property
    def _dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size if self.given_tokenizer is None else len(self.given_tokenizer))

    def _tokenize(self) -> Iterator[dict[str, np.ndarray]]:
        how = f"with a tokenizer of {self.vocab_size} tokens, to be trained" if self.given_tokenizer is None else ""
        print(f"Tokenizing {self.source.name} once {how}: {self.folder}", flush=True)
        begun = time.perf_counter()
        tokenizer = self.given_tokenizer or tokenizer_of(
            self.source,
            vocab_size=self.vocab_size,
            val_fraction=self.val_fraction,
            sample_bytes=self.tokenizer_sample_bytes,
        )
        tokenizer.save_pretrained(self.folder)
        tokens = {"train": 0, "val": 0}
        for row in token_rows(self.source, tokenizer=tokenizer, val_fraction=self.val_fraction):
            tokens = {split: count + len(row[split]) for split, count in tokens.items()}
            yield row
        print(
            f"Tokenized in {time.perf_counter() - begun:.1f} s: {tokens['train']:,} tokens for training, "
            f"{tokens['val']:,} for validation",
            flush=True,
        )

    def open(self) -> tuple[PreTrainedTokenizerBase, list[pa.ChunkedArray], list[pa.ChunkedArray]]:
        stored = self._stored(self._missing)
        train, val = ([flat(stored, split)] for split in ("train", "val"))
        if not len(train[0]) and not self.source.has_val:  # possible with very few documents
            train, val = val, train
        if not len(val[0]):
            train, val = split_tail(train, fraction=self.val_fraction)
        return AutoTokenizer.from_pretrained(str(self.folder)), train, val

    def _missing(self) -> Iterator[dict[str, np.ndarray]]:
        raise FileNotFoundError(
            f"{self.folder} does not exist, though it was prepared: do all nodes see the same source, with the same "
            "modification times? If not, set data.cache_dir to a local folder of each node"
        )


def flat(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """The tokens ``[tokens]`` of all rows of a column, concatenated and memory-mapped like the dataset.

    Args:
        dataset: Dataset with a list of tokens in each row.
        column: Name of the column.
    """
    rows = dataset.data.column(column)
    return pa.chunked_array([chunk.flatten() for chunk in rows.chunks], type=rows.type.value_type)


def check_vocab_size(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> None:
    """Check that a tokenizer has at most ``vocab_size`` tokens.

    Args:
        tokenizer: Tokenizer of the data.
        vocab_size: Size of the vocabulary.

    Raises:
        ValueError: If it has more.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is less than the {len(tokenizer)} tokens of data.tokenizer="
            f"{tokenizer.name_or_path}; use data.vocab_size={len(tokenizer)}"
        )
