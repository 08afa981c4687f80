"""The comparison launches every system in turns, survives those that fail, and goes on where it was ended."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import compare, launches
from benchmarks.comparison.launches import Launch, Shape
from tests.benchmarks.clusters import needs_cluster

FAKE = Path(__file__).with_name("fake_worker.py")
SMALL = shlex.split("--shapes 2x2 --micro-steps 1 2 --rates 40 --rounds 1 --steps 2 --warmup-steps 1 --loss-steps 3")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fake worker takes the place of the real one; lists what was launched."""
    seen: list[str] = []

    def command(launch: Launch, folder: Path) -> list[str]:
        seen.append(f"{launch.system} {launch.purpose}")
        files = ["--plan", str(folder / "plan.json"), "--out", str(folder)]
        return [sys.executable, str(FAKE), "--system", launch.system, *files]

    monkeypatch.setattr(launches, "worker_command", command)
    return seen


def settings(*arguments: str) -> compare.Settings:
    return compare._settings(compare._parser().parse_args([*arguments, "--out", "x"]))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@needs_cluster
def test_systems_are_launched_measured_and_put_on_a_page_and_a_failure_stops_nobody(
    launched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systems = ["--systems", "ddp", "deepspeed-zero3", "mics@node"]
    assert compare.main([*SMALL, *systems, "--out", str(tmp_path)]) == 1
    assert "deepspeed-zero3 ... " in (printed := capsys.readouterr().out) and "FAILED: node" in printed
    purposes = ("timing", "losses-sgd", "losses-adamw")
    assert launched == [f"{system} {purpose}" for system in systems[1:] for purpose in purposes]

    by_name = {(each["system"], each["purpose"]): each for each in results(tmp_path)["launches"]}
    timing = by_name["mics@node", "timing"]
    rates = [(phase["rate_mbit"], phase["micro_steps"]) for phase in timing["phases"]]
    assert rates == [(None, 1), (None, 2), (40, 1), (40, 2)]
    for phase in timing["phases"]:
        assert [len(seconds) for seconds in phase["seconds"]] == [2] * 4
        assert all(400_000 < sent < 600_000 for sent in phase["sent_bytes"]), phase  # TCP may send again
        assert phase["accounted_bytes"] == [400_000] * 2
    assert not by_name["deepspeed-zero3", "timing"]["ok"]
    assert by_name["deepspeed-zero3", "timing"]["log"] == "no deepspeed-zero3 in ."  # no path of this machine

    page = (tmp_path / "README.md").read_text()
    assert "`deepspeed-zero3` failed (round 1, 2x2, timing" in page
    assert {"step-time-2x2.svg", "bytes-2x2.svg"} <= {file.name for file in tmp_path.iterdir()}


@needs_cluster
def test_finished_launches_are_not_repeated_but_failed_and_changed_ones_are(
    launched: list[str], tmp_path: Path
) -> None:
    systems = ["--systems", "ddp", "deepspeed-zero3", "--loss-steps", "0", "--out", str(tmp_path)]
    compare.main([*SMALL, *systems])
    launched.clear()
    compare.main([*SMALL, *systems])
    assert launched == ["deepspeed-zero3 timing"]
    launched.clear()
    compare.main([*SMALL, *systems, "--steps", "1"])
    assert launched == ["ddp timing", "deepspeed-zero3 timing"]  # one that failed is tried again with every call
    assert [each["system"] for each in results(tmp_path)["launches"]] == ["ddp", "deepspeed-zero3"]


@needs_cluster
def test_ctrl_c_keeps_what_has_been_measured(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perform = compare.perform

    def perform_or_end(launch: Launch, *args: Any, **options: Any) -> Any:
        if launch.system != "ddp":
            raise KeyboardInterrupt
        return perform(launch, *args, **options)

    monkeypatch.setattr(compare, "perform", perform_or_end)
    systems = ["--systems", "ddp", "mics@node", "--loss-steps", "0"]
    assert compare.main([*SMALL, *systems, "--out", str(tmp_path)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert [each["system"] for each in results(tmp_path)["launches"]] == ["ddp"]
    assert (tmp_path / "README.md").exists()


@needs_cluster
def test_a_launch_that_takes_too_long_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launches, "worker_command", lambda *_: ["sh", "-c", "echo waiting; sleep 1000"])
    options = ["--systems", "ddp", "--loss-steps", "0", "--launch-minutes", "0.005", "--out", str(tmp_path)]
    assert compare.main([*SMALL, *options]) == 1
    (launch,) = results(tmp_path)["launches"]
    assert launch["reason"] == "node 0 was stopped: the time limit of 0.3 s was over"
    assert launch["log"] == "waiting"


@needs_cluster
def test_a_launch_without_all_results_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launches, "worker_command", lambda *_: ["true"])
    assert compare.main([*SMALL, "--systems", "ddp", "--loss-steps", "0", "--out", str(tmp_path)]) == 1
    assert results(tmp_path)["launches"][0]["reason"] == "no results of ranks [0, 1, 2, 3]"


@needs_cluster
def test_an_environment_that_cannot_be_made_is_a_failure_of_that_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def command(*_: object) -> list[str]:
        raise RuntimeError("pip found no such version")

    monkeypatch.setattr(launches, "worker_command", command)
    assert compare.main([*SMALL, "--systems", "ddp", "--loss-steps", "0", "--out", str(tmp_path)]) == 1
    assert results(tmp_path)["launches"][0]["reason"] == "RuntimeError: pip found no such version"


def test_each_round_begins_with_another_system_and_has_all_of_them() -> None:
    chosen = settings("--shapes", "4x2", "--rounds", "3", "--loss-steps", "0")
    orders = [[launch.system for launch in compare.round_of(chosen, number)] for number in range(3)]
    assert len({order[0] for order in orders}) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) == sorted(compare.SYSTEMS)


def test_losses_are_compared_once_with_both_optimizers() -> None:
    chosen = settings("--shapes", "2x4", "--rounds", "2", "--systems", "ddp", "--loss-steps", "50")
    planned = [
        (launch.purpose, launch.plan.optimizer) for number in range(2) for launch in compare.round_of(chosen, number)
    ]
    assert planned == [("timing", "sgd"), ("losses-sgd", "sgd"), ("losses-adamw", "adamw"), ("timing", "sgd")]


def test_systems_that_need_more_nodes_are_left_out_of_small_shapes() -> None:
    chosen = settings("--shapes", "2x4", "4x2", "--systems", "mics-flat@two-nodes", "--loss-steps", "0")
    assert [launch.shape for launch in compare.round_of(chosen, 0)] == [Shape(nodes=4, ranks_per_node=2)]


def test_the_workload_can_be_resized() -> None:
    workload = settings("--workload", "width=256", "layers=2", "learning_rate=0.01").workload
    assert (workload.width, workload.layers, workload.learning_rate) == (256, 2, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8"], "shape='8' is no cluster; write NODESxRANKS"),
        (["--shapes", "1x8"], "at least two nodes, such as 2x4"),
        (["--systems", "horovod"], "no system is called 'horovod'; there are ddp,"),
        (["--rounds", "0"], "rounds=0 must be at least 1"),
        (["--micro-steps", "0"], "--micro-steps and --rates must be at least 1"),
        (["--workload", "depth=3"], "--workload 'depth=3': use one of layers, width,"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_launched(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
