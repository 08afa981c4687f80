"""The page of what "auto" gains: the other formula, the rates of equal seconds, and the page itself."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.auto import __main__ as program
from benchmarks.auto.equal_rates import draw, least_rate
from benchmarks.auto.jobs import planned_jobs
from benchmarks.auto.order_free import order_free, step_seconds
from benchmarks.auto.page import write_page
from lightning_mics import CommunicationOptions
from lightning_mics.cost import step_time
from lightning_mics.cost.hardware import find_instance
from lightning_mics.cost.step_time import Arithmetic, collective_seconds
from lightning_mics.cost.step_traffic import Unit, step_traffic
from lightning_mics.policy import candidates
from lightning_mics.topology import Topology

P4D = find_instance("p4d.24xlarge")
UNITS = [Unit(((2**12, 2**10),), is_root=index == 0) for index in range(4)]


@pytest.mark.parametrize("micro_steps", [1, 2, 5])
@pytest.mark.parametrize("flops", [1e9, 1e13])
def test_the_other_formula_hides_half_of_the_shorter_in_each_micro_step(micro_steps: int, flops: float) -> None:
    topology = Topology(world_size=16, ranks_per_node=8, partition_size=16)
    traffic = step_traffic(UNITS, topology, communication=CommunicationOptions.NODE, gathered_dtype=torch.bfloat16)
    (found,) = step_seconds(traffic, P4D, [Arithmetic(micro_steps=micro_steps, micro_step_flops=flops)])
    compute = flops / (P4D.peak_tflops * 1e12 * P4D.kernel_share)
    expected = most = 0.0
    for index in range(micro_steps):
        whens = {"every"} | ({"first"} if index == 0 else set()) | ({"boundary"} if index == micro_steps - 1 else set())
        runs = [each for each in traffic if each.when in whens]
        communication = sum(collective_seconds(each.collective, P4D) * len(each.phases) for each in runs)
        most += compute + communication
        expected += compute + communication - 0.5 * min(compute, communication)
    assert (found.expected, found.most) == pytest.approx((expected, most))


def test_the_other_formula_is_used_for_as_long_as_it_is_asked_for() -> None:
    with order_free():
        assert candidates.step_seconds is step_seconds
    assert candidates.step_seconds is step_time.step_seconds


def test_the_other_formula_knows_no_link_to_the_host() -> None:
    traffic = step_traffic(UNITS, Topology(world_size=2, ranks_per_node=1, partition_size=2))
    with pytest.raises(ValueError, match="no link to the host"):
        step_seconds(traffic, P4D, [Arithmetic(micro_steps=1, micro_step_flops=1, host_bytes=1)])


@pytest.mark.parametrize("enough", [1.0, 37.0, 399.0, 400.0])
def test_the_least_rate_is_found_within_a_hundredth(enough: float) -> None:
    found = least_rate(lambda rate: rate >= enough, own=400)
    assert enough <= found <= 1.011 * enough


def test_the_picture_has_a_line_for_each_job(tmp_path) -> None:
    row = {"model": "gpt", "cluster": "p4d", "overrides": ["global_batch_size=64"], "own_mbit_per_s": 4e5}
    draw([row | {"mbit_per_s": 2e5, "on_host_mbit_per_s": 1e5}] * 2, tmp_path / "rates.svg")
    assert (tmp_path / "rates.svg").stat().st_size > 1000


@pytest.mark.rehearsal
def test_the_page_compares_three_plans_of_each_pair(tmp_path) -> None:
    arguments = ["--models", "bert-base", "--clusters", "p3dn_2", "--jobs", "1", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["network_rate_gbits_per_s"] for row in results["rows"]] == [100, 25]
    for row in results["rows"]:
        assert row["order_free"]["over_baseline"] >= 1 and row["on_host"]["over_baseline"] >= 1
        assert row["on_host"]["fits"] and row["order_free"]["fits"]
    assert results["summary"]["pairs"] == 2 and results["summary"]["least_ratio"] >= 1
    page = (tmp_path / "README.md").read_text()
    assert "| bert-base | p3dn_2 | 100 |" in page and f"python -m benchmarks.auto {' '.join(arguments)}" in page


@pytest.mark.rehearsal
def test_the_page_compares_jobs_with_and_without_the_host(tmp_path) -> None:
    (job,) = planned_jobs([("bert-base", "p3dn_2", (25,), ("data.batch_size=8",))])
    assert {job[name]["micro_batch"] for name in ("recommended", "baseline", "baseline_tuned", "on_host")} == {8}
    assert job["on_host"]["fits"]
    assert job["on_host"]["seconds"]["expected"] <= 1.001 * job["recommended"]["seconds"]["expected"]
    row = job | {"order_free": {"over_baseline": 1.0, "over_tuned": 1.0}}
    write_page(tmp_path, [row | {"on_host": row["order_free"]}], "a command", jobs=[job])
    assert json.loads((tmp_path / "results.json").read_text())["jobs"][0]["overrides"] == ["data.batch_size=8"]
    gain = job["baseline"]["seconds"]["expected"] / job["recommended"]["seconds"]["expected"]
    (line,) = [each for each in (tmp_path / "README.md").read_text().splitlines() if "micro-batch 8" in each]
    assert line.startswith("| bert-base on p3dn_2, micro-batch 8 | 25 |") and f"| {gain:.3f} |" in line
