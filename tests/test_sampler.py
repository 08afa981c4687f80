"""A sampler whose position holds on any number of ranks, under torchdata's loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import ResumableSampler

SAMPLES, STEP = 103, 16


def loader(rank: int, ranks: int, *, epoch: int = 0, batch_size: int = 2, **options: Any) -> StatefulDataLoader[Any]:
    data = torch.arange(SAMPLES)
    sampler = ResumableSampler(data, global_batch_size=STEP, num_replicas=ranks, rank=rank, seed=3)
    sampler.set_epoch(epoch)
    return StatefulDataLoader(data, batch_size=batch_size, sampler=sampler, **options)


def dealt(loaders: list[StatefulDataLoader[Any]], *, batches: int | None = None) -> list[int]:
    """The samples of all ranks in the order of the epoch, of so many batches or all that are left."""
    taken = [list(zip(range(batches or SAMPLES), each, strict=False)) for each in loaders]
    by_rank = [torch.cat([batch for _, batch in of_rank]) for of_rank in taken]
    return torch.stack(by_rank, dim=1).flatten().tolist()


def whole_epoch(epoch: int = 0) -> list[int]:
    return dealt([loader(0, 1, epoch=epoch)])


def test_an_epoch_is_shuffled_anew_and_cut_to_whole_steps() -> None:
    assert len(set(whole_epoch())) == len(whole_epoch()) == SAMPLES // STEP * STEP < SAMPLES
    assert whole_epoch(0) != whole_epoch(1)
    assert whole_epoch() != sorted(whole_epoch())


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_deal_out_the_same_order(ranks: int) -> None:
    assert dealt([loader(rank, ranks) for rank in range(ranks)]) == whole_epoch()


@pytest.mark.parametrize("before", [1, 2, 4, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [2, 1])
def test_other_ranks_take_what_is_left(before: int, after: int, batch_size: int) -> None:
    stopped = [loader(rank, before, epoch=1) for rank in range(before)]
    begun = dealt(stopped, batches=3 * 16 // (2 * before))
    resumed = [loader(rank, after, batch_size=batch_size) for rank in range(after)]
    for each in resumed:
        each.load_state_dict(stopped[0].state_dict())
    assert 0 < len(begun) < len(whole_epoch(1))
    assert begun + dealt(resumed) == whole_epoch(1)
    for each in resumed:
        each.sampler.set_epoch(2)
    assert dealt(resumed) == whole_epoch(2)


def test_what_workers_have_prefetched_is_not_taken_yet() -> None:
    stopped = loader(0, 2, epoch=1, num_workers=2, prefetch_factor=3)
    begun = [batch for _, batch in zip(range(4), stopped, strict=False)]
    state = stopped.state_dict()
    assert torch.cat(begun).tolist() == whole_epoch(1)[: 4 * 2 * 2 : 2]
    resumed = [loader(rank, 4, num_workers=2) for rank in range(4)]  # epoch 0 until the state is loaded
    for each in resumed:
        each.load_state_dict(state)
    assert dealt(resumed) == whole_epoch(1)[4 * 2 * 2 :]


def test_a_state_holds_plain_numbers_and_stays_the_same_when_loaded() -> None:
    stopped = loader(1, 2)
    next(iter(stopped))
    resumed = loader(0, 4)
    resumed.load_state_dict(stopped.state_dict())
    iter(resumed)
    sampler_state = resumed.state_dict()["_sampler_iter_state"]["sampler_iter_state"]
    assert sampler_state == {"epoch": 0, "samples_of_all_ranks": 4}


def test_a_step_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size=10 is not a multiple of the number of ranks, 4"):
        ResumableSampler(range(50), global_batch_size=10, num_replicas=4, rank=0)


def test_a_dataset_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a dataset of 7 samples is smaller than global_batch_size=8"):
        ResumableSampler(range(7), global_batch_size=8, num_replicas=4, rank=0)


def test_a_place_that_ranks_cannot_have_reached_is_refused() -> None:
    state = loader(0, 2).state_dict()
    state["_sampler_iter_state"]["sampler_iter_state"]["samples_of_all_ranks"] = 6
    resumed = loader(0, 4)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="interrupted after 6 samples, which 4 ranks cannot have taken equally"):
        iter(resumed)
