"""The systems that a plan holds MiCS against: what they send, and what they hold."""

from __future__ import annotations

import pytest

from lightning_mics.policy.baselines import full_sharding, full_sharding_tuned, unsharded_weights
from lightning_mics.policy.candidates import Candidate
from tests.policy.test_candidates import job

RANKS, PER_NODE = 32, 8


def bytes_of_ranks(candidate: Candidate) -> float:
    """What each rank gathers and reduces in a step, whole, from the bytes that a node sends."""
    sent = candidate.node_sent
    return (sent.inside_bytes + sent.between_bytes) / PER_NODE * RANKS / (RANKS - 1)


@pytest.mark.parametrize("micro_batch", [1, 4, 32])
def test_weights_that_stay_unsharded_are_gathered_once(micro_batch: int) -> None:
    each = job(micro_batch=micro_batch)
    size, steps = each.workload.size, 32 // micro_batch
    resharded, (kept, zero_2) = full_sharding(each), unsharded_weights(each)
    twice = 2 * size.gathered_bytes - size.root_bytes  # the root stays unsharded
    assert bytes_of_ranks(resharded) == pytest.approx(steps * (twice + size.reduced_bytes))
    assert bytes_of_ranks(kept) == pytest.approx(steps * (size.gathered_bytes + size.reduced_bytes))
    assert bytes_of_ranks(zero_2) == pytest.approx(size.gathered_bytes + steps * size.reduced_bytes)


def test_weights_that_stay_unsharded_take_memory() -> None:
    each = job(micro_batch=1)
    resharded, both = full_sharding(each), unsharded_weights(each)
    for candidate in both:
        assert candidate.memory_bytes - resharded.memory_bytes > 0.9 * each.workload.size.gathered_bytes


def test_what_is_tuned_is_as_fast_as_full_sharding_without_resharding() -> None:
    each = job()
    kept, _ = unsharded_weights(each)
    assert kept.fits
    assert full_sharding_tuned(each).seconds.expected <= kept.seconds.expected
