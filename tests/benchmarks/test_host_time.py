"""The page on the host's time compares figures of the same turn, and a measurement counts what a step calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.host_time import RANKS, SYSTEMS, calls_of, ratio, step_of, write_page

PAPER = "mics, as in the paper"


def test_ratios_are_of_the_same_turn_and_the_page_shows_them(tmp_path: Path) -> None:
    slow, ratios = (1.0, 5.0), (1.1, 1.2)  # by turn: what the machine adds, and what the system does
    measured = [
        {"turn": turn, "system": system, "checkout": age, "wall": figure, "processor": figure, "calls": 1000.0}
        for turn in (0, 1)
        for system, age, figure in (
            ("fsdp2", "now", slow[turn]),
            (PAPER, "now", slow[turn] * ratios[turn]),
            (PAPER, "before", slow[turn]),
        )
    ]
    mean, low, high = ratio(measured, (PAPER, "now"), ("fsdp2", "now"), "wall")
    assert mean == pytest.approx((1.1 * 1.2) ** 0.5)
    assert low < mean < high < 2  # the machine's five times longer turn is in no ratio
    write_page(tmp_path, ["--turns", "2"], measured, 32, 24)
    page = (tmp_path / "README.md").read_text()
    assert f"| {PAPER} | plain FSDP2 | 3550.0 | 1000 | {mean:.3f} ({low:.3f} - {high:.3f}) |" in page
    assert f"| {PAPER} | the other checkout |" in page
    assert "python -m benchmarks.host_time --turns 2\n" in page


def calls(system: str) -> float:
    step = step_of(system, 32)
    for _ in range(3):
        step()
    return calls_of(step)


def test_a_step_takes_the_host_fewer_calls_than_under_fsdp2(run_shared: Any) -> None:
    """The host's work, by a figure that does not depend on the machine."""
    fsdp2, paper, once = (run_shared(RANKS, calls, system)[0] for system in SYSTEMS)
    assert once < 0.8 * fsdp2
    assert paper < fsdp2
