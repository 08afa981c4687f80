"""Windows of tokens for training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenWindows(Dataset):
    """``tokens`` cut into windows ``[length + 1]``, int64, whose targets (all tokens but the first) do not overlap.

    Args:
        tokens: One long sequence.
        length: How many targets a window has. What is left at the end of ``tokens`` is dropped.
        count: Take only so many windows, evenly spread; None takes all.

    Raises:
        ValueError: If ``tokens`` is too short for one window.
    """

    def __init__(self, tokens: np.ndarray, *, length: int, count: int | None = None) -> None:
        available = (len(tokens) - 1) // length
        if available < 1:
            raise ValueError(f"{len(tokens)} tokens are too few for one window of {length} + 1; use a shorter window")
        taken = available if count is None else min(count, available)
        self._tokens = tokens
        self._length = length
        self._starts = np.linspace(0, available, num=taken, endpoint=False).astype(np.int64) * length  # [windows]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self._starts[index]
        return torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
