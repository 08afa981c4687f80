"""Windows of tokens for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

TokenSequence = np.ndarray | pa.ChunkedArray  # slices of both are read on demand


class TokenWindows(Dataset):
    """Tokens cut into windows ``[length + overlap]``, int64, one every ``length`` tokens.

    With an overlap of 1 the targets (all tokens but the first) of windows do not overlap.

    Args:
        tokens: One or several long sequences ``[tokens]``; no window spans two, and remainders are dropped.
        length: Tokens from the start of a window to the start of the next.
        overlap: Tokens that a window has in common with the next.
        count: Number of windows to take, evenly spread; None takes all.
        name: Name of the tokens in errors.

    Raises:
        ValueError: If the tokens are too few for one window.
    """

    def __init__(
        self,
        tokens: TokenSequence | Sequence[TokenSequence],
        *,
        length: int,
        overlap: int = 1,
        count: int | None = None,
        name: str = "the text",
    ) -> None:
        self._sequences = [tokens] if isinstance(tokens, TokenSequence) else list(tokens)
        windows = [max(0, len(sequence) - overlap) // length for sequence in self._sequences]
        self._ends = np.cumsum(windows)  # [sequences], in windows
        self._available = int(self._ends[-1])
        if self._available < 1:
            raise ValueError(
                f"{name} has {sum(map(len, self._sequences))} tokens, too few for one window of {length} + {overlap}; "
                "use more text or a shorter data.sequence_length"
            )
        self._length, self._overlap = length, overlap
        self._taken = self._available if count is None else min(count, self._available)

    def __len__(self) -> int:
        return self._taken

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._taken:  # so that iteration by index ends
            raise IndexError(f"window {index} of {self._taken}")
        window = index * self._available // self._taken
        sequence = int(np.searchsorted(self._ends, window, side="right"))
        first = int(self._ends[sequence - 1]) if sequence else 0
        start = (window - first) * self._length
        tokens = self._sequences[sequence][start : start + self._length + self._overlap]
        return torch.from_numpy(np.array(tokens, dtype=np.int64))
