"""Windows of tokens for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenWindows(Dataset):
    """Tokens cut into windows ``[length + overlap]``, int64, one every ``length`` tokens.

    With an overlap of 1 the targets (all tokens but the first) of windows do not overlap.

    Args:
        tokens: One or several long sequences; no window is of two. What is left at their ends is dropped.
        length: From the start of a window to that of the next.
        overlap: How many tokens a window has in common with the next.
        count: Take only so many windows, evenly spread; None takes all.
        name: Of the tokens, for errors.

    Raises:
        ValueError: If the tokens are too few for one window.
    """

    def __init__(
        self,
        tokens: np.ndarray | Sequence[np.ndarray],
        *,
        length: int,
        overlap: int = 1,
        count: int | None = None,
        name: str = "the text",
    ) -> None:
        self._sequences = [tokens] if isinstance(tokens, np.ndarray) else list(tokens)
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
        if not 0 <= index < self._taken:  # so that a plain loop ends
            raise IndexError(f"window {index} of {self._taken}")
        window = index * self._available // self._taken
        sequence = int(np.searchsorted(self._ends, window, side="right"))
        first = int(self._ends[sequence - 1]) if sequence else 0
        start = (window - first) * self._length
        tokens = self._sequences[sequence][start : start + self._length + self._overlap]
        return torch.from_numpy(tokens.astype(np.int64))
