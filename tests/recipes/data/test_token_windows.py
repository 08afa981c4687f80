from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.data.token_windows import TokenWindows

TOKENS = np.arange(1003, dtype=np.uint16)


def test_targets_of_windows_cover_the_split_without_overlap() -> None:
    windows = TokenWindows(TOKENS, length=10)
    assert windows[0].dtype == torch.int64
    assert torch.stack(list(windows))[:, 1:].flatten().tolist() == list(range(1, 1001))


def test_windows_without_overlap_cover_the_split() -> None:
    assert torch.cat(list(TokenWindows(TOKENS, length=10, overlap=0))).tolist() == list(range(1000))


def test_no_window_is_of_two_sequences() -> None:
    parts = [TOKENS[:25], TOKENS[:0], TOKENS[100:105], TOKENS[200:231]]
    windows = torch.stack(list(TokenWindows(parts, length=10)))
    assert windows[:, 0].tolist() == [0, 10, 200, 210, 220]
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()


def test_a_count_of_windows_is_spread_over_the_split() -> None:
    windows = torch.stack(list(TokenWindows(TOKENS, length=10, count=7)))  # [windows, length + 1]
    assert windows.shape == (7, 11)
    assert len(set(windows[:, 1:].flatten().tolist())) == 70
    assert windows[-1, 0] > 800


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the text has 10 tokens, too few for one window of 10 \+ 1; use more text"):
        TokenWindows(TOKENS[:10], length=10)
