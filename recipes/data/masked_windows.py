"""Windows of tokens, some of them masked, for the masked objective of BERT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from lightning_mics import ResumableSampler
from recipes.data.token_windows import TokenSequence, TokenWindows


class MaskedWindows(Dataset):
    """``{"input_ids": [length], "labels": [length]}``, int64; labels are -100 at tokens that are not masked.

    Windows run over the ends of documents, as RoBERTa's do ("FULL-SENTENCES" in its section 4.2), and do not overlap.
    Each begins and ends with the tokenizer's cls and sep tokens if it has them. The collator of ``transformers`` masks
    15 %.

    The masks of a window are drawn from the seed, the window and the epoch alone: they are the same on any number of
    ranks and workers and after a resume. Sample ``epoch * len(self) + window`` is ``window`` with masks of ``epoch``.
    Validation uses epoch 0, so its masks are always the same.

    Args:
        tokens: One or several long sequences ``[tokens]``.
        length: Tokens in a window.
        tokenizer: A tokenizer with a mask token.
        seed: Seed of the masks.
        count: Number of windows to take, evenly spread; None takes all.
        name: Name of the tokens in errors.

    Raises:
        ValueError: If the tokens are too few for one window, or the tokenizer has no mask token.
    """

    def __init__(
        self,
        tokens: TokenSequence | Sequence[TokenSequence],
        *,
        length: int,
        tokenizer: PreTrainedTokenizerBase,
        seed: Sequence[int],
        count: int | None = None,
        name: str = "the text",
    ) -> None:
        check_mask_token(tokenizer)
        self._begin, self._end = edge_tokens(tokenizer)
        body = length - len(self._begin) - len(self._end)
        self._windows = TokenWindows(tokens, length=body, overlap=0, count=count, name=name)
        self._seed = list(seed)
        self._special = torch.tensor(tokenizer.all_special_ids)
        self._collator = DataCollatorForLanguageModeling(tokenizer)

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The windows of epoch 0; iteration by index would not end, because indices extend to all epochs."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        window = self._windows[number % len(self)]
        tokens = torch.cat([self._begin, window, self._end])[None]  # [1, length]
        self._collator.generator = torch.Generator().manual_seed(self._mask_seed(number))
        special = torch.isin(tokens, self._special)
        inputs, labels = self._collator.torch_mask_tokens(tokens, special_tokens_mask=special)
        return {"input_ids": inputs[0], "labels": labels[0]}

    def _mask_seed(self, number: int) -> int:
        return int(np.random.SeedSequence([*self._seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EpochSampler(ResumableSampler):
    """Encodes the epoch in each index for :class:`MaskedWindows`, so that persistent workers know it as well."""

    def own_order(self) -> Iterator[int]:
        windows = len(self.dataset)
        return (self.epoch * windows + window for window in super().own_order())


def check_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has a mask token.

    Raises:
        ValueError: If it has none.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no mask token, which a masked model needs; use the tokenizer "
            "of a masked model, or data.tokenizer=null to train one"
        )


def edge_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """The tokens ``[edge]`` before and after each sequence: one each as in BERT, or none."""
    tokens = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    begin, end = ([] if token is None else [token] for token in tokens)
    return torch.tensor(begin, dtype=torch.int64), torch.tensor(end, dtype=torch.int64)
