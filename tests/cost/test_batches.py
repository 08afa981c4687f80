from __future__ import annotations

import re
from itertools import product

import pytest

from lightning_mics.cost.batches import Batches, split_global_batch


@pytest.mark.parametrize(("ranks", "per_rank", "largest"), [*product((1, 4, 512), (1, 6, 16, 35), (1, 4, 100))])
def test_whatever_is_chosen_makes_up_the_global_batch(ranks: int, per_rank: int, largest: int) -> None:
    batches = split_global_batch(ranks * per_rank, ranks=ranks, largest_micro=largest)
    assert batches.micro * batches.accumulation == per_rank
    assert batches.micro <= largest
    larger = [micro for micro in range(batches.micro + 1, largest + 1) if per_rank % micro == 0]
    assert not larger


def test_what_is_given_stays() -> None:
    assert split_global_batch(64, ranks=4, micro=2) == Batches(2, 8)
    assert split_global_batch(64, ranks=4, accumulation=2) == Batches(8, 2)
    assert split_global_batch(64, ranks=4, micro=4, accumulation=4) == Batches(4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"global_batch_size": 1000, "ranks": 512},
            "global_batch_size=1000 sequences cannot be split over 512 ranks; the nearest that can are 512 and 1024",
        ),
        (
            {"global_batch_size": 100, "ranks": 512},
            "global_batch_size=100 sequences cannot be split over 512 ranks; the nearest that can are 512 and 1024",
        ),
        (
            {"global_batch_size": 100, "ranks": 4, "micro": 8},
            "global_batch_size=100 sequences cannot be split over 4 ranks x data.batch_size=8; "
            "the nearest that can are 96 and 128",
        ),
        (
            {"global_batch_size": 100, "ranks": 4, "accumulation": 3},
            "over 4 ranks x trainer.accumulate_grad_batches=3; the nearest that can are 96 and 108",
        ),
        (
            {"global_batch_size": 100, "ranks": 4, "micro": 5, "accumulation": 4},
            "global_batch_size=100 sequences are not 4 ranks x data.batch_size=5 x trainer.accumulate_grad_batches=4 = "
            "80; set global_batch_size=80",
        ),
        ({"global_batch_size": 0, "ranks": 4}, "global_batch_size=0 must be a whole number of at least 1"),
        ({"global_batch_size": 8, "ranks": 4, "micro": -1}, "data.batch_size=-1 must be a whole number of at least 1"),
        (
            {"global_batch_size": 8, "ranks": 4, "accumulation": 0.5},
            "trainer.accumulate_grad_batches=0.5 must be a whole",
        ),
    ],
)
def test_an_impossible_batch_is_refused_with_the_nearest_possible(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        split_global_batch(**given)
