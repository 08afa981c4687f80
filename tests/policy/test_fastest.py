"""What is equally fast is bounded by FSDP2 at its best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mics import CommunicationOptions
from lightning_mics.policy.baselines import full_sharding
from lightning_mics.policy.candidates import Candidate
from lightning_mics.policy.fastest import fastest
from tests.policy.test_candidates import job


def timed(candidate: Candidate, seconds: float, *, memory_bytes: int = 1) -> Candidate:
    """The candidate with other times, and memory by which equally fast ones are told apart."""
    times = replace(candidate.seconds, least=seconds, expected=seconds, most=seconds)
    return replace(candidate, seconds=times, memory_bytes=memory_bytes, fits=True)


@pytest.mark.parametrize(("tuned", "expected"), [(0.98, 1.0), (1.0, 1.0), (1.003, 1.003), (1.02, 1.009)])
def test_of_what_is_equally_fast_the_simplest_is_taken_that_is_no_slower_than_fsdp2_tuned(
    tuned: float, expected: float
) -> None:
    (any_candidate, *_) = job().candidates("auto", CommunicationOptions.AUTO)
    ways = [
        timed(any_candidate, seconds, memory_bytes=memory)
        for memory, seconds in enumerate([1.02, 1.009, 1.003, 1.0], 1)
    ]
    baseline = timed(full_sharding(job()), 1.1)
    assert fastest(ways, baseline, timed(baseline, tuned)).seconds.expected == expected
