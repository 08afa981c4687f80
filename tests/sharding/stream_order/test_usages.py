"""On streams that run later, every option set and usage is ordered, and the host waits for nothing."""

from __future__ import annotations

import pytest
from torch.distributed.fsdp import FSDPModule

from tests.support.stream_order.jobs import (
    OPTIONS,
    USAGES,
    Findings,
    Job,
    findings,
    run_usage,
    simulated_job,
    train,
)

CASES = [(options, usage) for options in OPTIONS for usage in USAGES]


@pytest.mark.parametrize(("options", "usage"), CASES)
def test_all_uses_of_memory_are_ordered(options: str, usage: str) -> None:
    assert findings(options)[usage].order == ()


@pytest.mark.parametrize(("options", "usage"), CASES)
def test_the_host_waits_for_nothing_in_a_step(options: str, usage: str) -> None:
    assert findings(options)[usage].waits == ()


def test_the_host_waits_for_a_comparison_of_buffers_in_the_first_window_only() -> None:
    with simulated_job("two stages", "32-true", buffer=True) as job:
        assert any("broadcast_buffers" in place for place in run_usage(job, Job.window).waits)
        for _ in range(4):
            assert run_usage(job, train) == Findings(order=(), waits=())


@pytest.mark.parametrize("options", ["two stages", "node cache and sums"])
def test_torch_before_2_13_abandons_a_window_without_waiting(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_job(options, "bf16-mixed") as job:
        monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
        assert run_usage(job, USAGES["an abandoned window"]) == Findings(order=(), waits=())
