"""The result page says what ``results.json`` holds: medians, spreads, ratios, differences and failures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import result_page
from benchmarks.comparison.measurements import Measurements, Setting, Spread
from benchmarks.comparison.systems import resolve

MEGABYTE = 10**6
SLOW = Setting(shape="2x1", rate_mbit=80, micro_steps=4)
FREE = Setting(shape="2x1", rate_mbit=None, micro_steps=4)


def phase(rate_mbit: float | None, seconds: list[list[float]], megabytes: list[float], **more: Any) -> dict[str, Any]:
    steps = len(seconds[0])
    return {
        "name": "unshaped" if rate_mbit is None else "slow",
        "rate_mbit": rate_mbit,
        "micro_steps": 4,
        "warmup_steps": 0,
        "steps": steps,
        "seconds": seconds,
        "losses": [[3.0, 2.0], [3.5, 2.5]],
        "sent_bytes": [round(sent * steps * MEGABYTE) for sent in megabytes],
        "accounted_bytes": [None, None],
        **more,
    }


def launch(
    system: str, reach: str, number: int, phases: list[dict[str, Any]], purpose: str = "timing"
) -> dict[str, Any]:
    return {
        "ok": True,
        "reason": None,
        "log": "",
        "seconds": 9.0,
        "commit": "abc123",
        "date": f"2026-01-0{number + 1} 10:00",
        "shape": "2x1",
        "system": system,
        "reach": reach,
        "keeps": resolve(system).keeps,
        "purpose": purpose,
        "round": number,
        "optimizer": "sgd",
        "versions": {"torch": "2.13.0"},
        "notes": ["bucket | of 25 MB"],
        "phases": phases,
    }


def example() -> dict[str, Any]:
    """DDP and ours on two nodes of one rank; DeepSpeed failed."""
    free = phase(None, [[1.0, 1.0], [1.0, 1.0]], [20, 20])
    rounds = [
        phase(80, [[3.0, 2.0], [2.0, 4.0]], [20, 20]),  # steps of 3 and 4 s: the slowest rank's
        phase(80, [[5.0, 6.0], [5.0, 6.0]], [20, 22]),
    ]
    own = phase(80, [[2.0], [1.0]], [10.1, 10.1], accounted_bytes=[10 * MEGABYTE, 10 * MEGABYTE])
    own_losses = phase(None, [[1.0, 1.0], [1.0, 1.0]], [10, 10], losses=[[3.0, 2.0], [3.5, 2.5 + 2**-20]])
    failed = launch("deepspeed-zero3", "world", 0, [])
    failed = {key: value for key, value in failed.items() if key not in ("phases", "versions", "notes", "optimizer")}
    return {
        "command": "python -m benchmarks.comparison.compare --shapes 2x1",
        "machine": {"processor": "A CPU", "cores": 2, "memory_gib": 8, "kernel": "6.1", "tcp": "cubic", "python": "3"},
        "workload": {"layers": 3, "width": 64},
        "parameter_bytes": 10 * MEGABYTE,
        "micro_steps": [4],
        "rates_mbit": [80],
        "rounds": 2,
        "steps": 2,
        "warmup_steps": 1,
        "launch_minutes": 30,
        "launches": [
            launch("ddp", "node", 0, [free, rounds[0]]),
            launch("ddp", "node", 1, [rounds[1]]),
            launch("ddp", "node", 0, [free], "losses-sgd"),
            launch("mics-kept@node", "node", 0, [own]),
            launch("mics-kept@node", "node", 0, [own_losses], "losses-sgd"),
            {**failed, "ok": False, "reason": "node 1 ended with status 1", "log": "Traceback: ```no```"},
            {**failed, "ok": False, "reason": "node 1 ended with status 1", "log": "Traceback: ```no```", "round": 1},
        ],
    }


@pytest.fixture
def measurements() -> Measurements:
    return Measurements(example())


def test_a_step_takes_as_long_as_on_its_slowest_rank(measurements: Measurements) -> None:
    assert measurements.step_seconds("ddp", SLOW) == Spread(median=4.5, least=3, greatest=6)


def test_bytes_are_per_node_and_step(measurements: Measurements) -> None:
    assert measurements.step_bytes("ddp", SLOW) == Spread(median=20e6, least=20e6, greatest=22e6)
    assert measurements.least_bytes("2x1") == 10e6


def test_what_is_left_over_is_above_the_larger_of_computation_and_transfer(measurements: Measurements) -> None:
    assert measurements.left_over("ddp", SLOW) == pytest.approx(4.5 - 20 * 8 / 80)
    assert measurements.left_over("ddp", FREE) is None
    assert measurements.left_over("mics-kept@node", SLOW) is None  # its step on unshaped links was not measured


def test_ratios_are_to_ours_that_reaches_as_far_and_keeps_as_much(measurements: Measurements) -> None:
    assert measurements.speed_of_ours("ddp", SLOW) == pytest.approx(4.5 / 2)
    assert measurements.bytes_over_ours("ddp", SLOW) == pytest.approx(20 / 10.1)
    assert measurements.speed_of_ours("deepspeed-zero3", SLOW) is None


def test_losses_are_compared_over_all_ranks_and_steps(measurements: Measurements) -> None:
    assert measurements.losses_compared("2x1", "losses-sgd") == 4
    assert measurements.loss_difference("mics-kept@node", "2x1", "losses-sgd") == 2**-20
    assert measurements.loss_difference("mics-kept@node", "2x1", "timing") == 0
    assert measurements.loss_difference("deepspeed-zero3", "2x1", "losses-sgd") is None


def test_a_loss_that_is_no_number_does_not_pass_for_equal() -> None:
    results = example()
    results["launches"][4]["phases"][0]["losses"][0][0] = math.nan
    assert math.isnan(Measurements(results).loss_difference("mics-kept@node", "2x1", "losses-sgd") or 0)


def test_accounting_is_compared_with_the_links(measurements: Measurements) -> None:
    spread = measurements.accounting("mics-kept@node", "2x1")
    assert spread is not None and spread.median == pytest.approx(10 / 10.1)
    assert measurements.accounting("ddp", "2x1") is None


def test_the_page_says_all_of_it_from_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(example()))
    (tmp_path / "remarks.md").write_text("## What we think of it\n\nA remark.\n")
    page = result_page.write(tmp_path).read_text()
    for expected in (
        "| one node | everything | ddp | 4.5 (3 - 6); 2.25x |",
        "| one node | shards, M, G | **mics-kept@node** | 2 (2 - 2); 1.00x |",
        "| one node | everything | ddp | 20 (20 - 22); 2.00x; 1.98x |",
        "| one node | everything | ddp | 2.5 |",
        "| **mics-kept@node** | 2x1 | 0.99 (0.99 - 0.99) |",
        "| **mics-kept@node** | 0.0e+00 | 9.5e-07 |",
        "`deepspeed-zero3` failed (round 1, 2x1, timing; round 2, 2x1, timing): node 1 ended with status 1.",
        "Traceback: '''no'''",
        "A CPU, 2 cores, 8 GiB, Linux 6.1",
        "Parameters M = 10.00 MB; layers 3, width 64",
        "2 rounds in turns",
        "abc123; 2026-01-01 10:00 to 2026-01-02 10:00 UTC",
        "python -m benchmarks.comparison.compare --shapes 2x1",
        "| ddp | one node | everything | torch 2.13.0 | bucket \\| of 25 MB |",
        "## What we think of it",
        "*measured*",
        "*computed*",
    ):
        assert expected in page, expected
    assert str(tmp_path) not in page


def test_every_picture_of_the_page_is_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(example()))
    result_page.main([str(tmp_path)])
    pictures = {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")}
    page = (tmp_path / "README.md").read_text()
    assert sorted(pictures) == ["bytes-2x1.svg", "step-time-2x1.svg"]
    assert all(f"({name})" in page for name in pictures)
    assert b"ddp" in pictures["bytes-2x1.svg"] and b"mics-kept@node" in pictures["bytes-2x1.svg"]
    result_page.main([str(tmp_path)])
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")} == pictures
