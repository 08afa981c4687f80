from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.token_windows import ResumableLoader, ResumableSampler, TokenWindows

TOKENS = np.arange(1003, dtype=np.uint16)


def loader(*, rank: int = 0, epoch: int = 0) -> ResumableLoader:
    windows = TokenWindows(TOKENS, length=10)
    sampler = ResumableSampler(windows, num_replicas=2, rank=rank, shuffle=True, seed=1, drop_last=True)
    sampler.set_epoch(epoch)
    return ResumableLoader(windows, batch_size=4, sampler=sampler, drop_last=True)


def seen(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches)[:, 1:].flatten().tolist() if batches else []


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


def test_ranks_share_an_epoch_without_overlap() -> None:
    first, second = seen(list(loader(rank=0))), seen(list(loader(rank=1)))
    assert len(first) == len(second) == 480
    assert not set(first) & set(second)


def test_epochs_have_different_orders() -> None:
    assert seen(list(loader(epoch=0))) != seen(list(loader(epoch=1)))


@pytest.mark.parametrize("delivered", [1, 5, 11])
def test_a_loader_goes_on_where_its_state_was_saved(delivered: int) -> None:
    whole = list(loader())
    stopped = loader()
    batches = iter(stopped)
    begun = [next(batches) for _ in range(delivered)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert len(resumed) == len(whole)  # Lightning counts from the saved position to the end of the whole epoch
    assert seen(begun + list(resumed)) == seen(whole)
    assert resumed.state_dict() == {"batches_delivered": len(whole)}
    assert seen(list(resumed)) == seen(whole)  # the next epoch is whole again


def test_a_state_from_the_end_of_an_epoch_starts_the_next() -> None:
    resumed = loader()
    resumed.load_state_dict({"batches_delivered": len(resumed)})
    assert len(list(resumed)) == len(resumed)
