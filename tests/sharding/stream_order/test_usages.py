"""On streams that run later, every option set and usage is ordered, and the host waits for nothing."""

from __future__ import annotations

import pytest

from tests.support.stream_order.jobs import (
    OPTIONS,
    PRECISIONS,
    USAGES,
    findings,
    run_usage,
    simulated_job,
    train,
    trained,
)

CACHED = {name for name, (_, options) in OPTIONS.items() if options.cache_parameters != "never"}
ON_NODES = {name for name, (_, options) in OPTIONS.items() if options.cache_parameters == "node"}
CASES = [(options, usage) for options in OPTIONS for usage in USAGES]


def waits_at_boundary(options: str, usage: str) -> pytest.MarkDecorator | tuple[()]:
    dropped = options not in ON_NODES and usage == "weights changed inside a window"  # before each use
    if options in CACHED and not dropped:
        return pytest.mark.xfail(strict=True, reason="the comparison of cached weights is read at the boundary")
    return ()


@pytest.mark.parametrize(("options", "usage"), CASES)
def test_all_uses_of_memory_are_ordered(options: str, usage: str) -> None:
    assert findings(options)[usage].order == ()


@pytest.mark.parametrize(("options", "usage"), [pytest.param(*case, marks=waits_at_boundary(*case)) for case in CASES])
def test_the_host_waits_for_nothing_in_a_step(options: str, usage: str) -> None:
    assert findings(options)[usage].waits == ()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_ordered_in_every_precision(options: str, precision: str) -> None:
    assert trained(options, precision).order == ()


@pytest.mark.xfail(strict=True, reason="the comparison of buffers after some windows is read at once")
def test_the_host_does_not_wait_for_a_comparison_of_buffers() -> None:
    with simulated_job("two stages", "32-true", buffer=True) as job:
        assert run_usage(job, train).waits == ()
