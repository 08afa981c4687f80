from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.token_windows import TokenWindows

TOKENS = np.arange(1003, dtype=np.uint16)


def test_targets_of_windows_cover_the_split_without_overlap() -> None:
    windows = TokenWindows(TOKENS, length=10)
    assert windows[0].dtype == torch.int64
    assert torch.stack(list(windows))[:, 1:].flatten().tolist() == list(range(1, 1001))


def test_a_count_of_windows_is_spread_over_the_split() -> None:
    windows = torch.stack(list(TokenWindows(TOKENS, length=10, count=7)))  # [windows, length + 1]
    assert windows.shape == (7, 11)
    assert len(set(windows[:, 1:].flatten().tolist())) == 70
    assert windows[-1, 0] > 800


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 tokens are too few for one window of 10 \+ 1"):
        TokenWindows(TOKENS[:10], length=10)
