"""How many operations this package adds to those of FSDP2."""

from __future__ import annotations

import pytest

from tests.support.stream_order.jobs import OPTIONS, simulated_job

PER_PARAMETER = pytest.mark.xfail(strict=True, reason="cached parameters are compared one by one")
CASES = [
    pytest.param(name, marks=PER_PARAMETER if options.cache_parameters == "rank" else ())
    for name, (_, options) in OPTIONS.items()
    if options.inter_node_reduce_dtype is None
]


def launches(options: str, *, further: int) -> int:
    """Operations that this package launches in an accumulation window."""
    with simulated_job(options, "32-true", further_parameters=further) as job:
        job.window(micro_steps=2)
        job.simulation.launches.clear()
        job.window()
        return sum(count for (owner, _), count in job.simulation.launches.items() if owner == "package")


@pytest.mark.parametrize("options", CASES)
def test_launches_do_not_grow_with_the_parameters_of_a_block(options: str) -> None:
    few = launches(options, further=0)
    assert few > 0
    assert launches(options, further=6) == few
