"""Nodes, ranks and keepers die in a job on an emulated cluster, and it goes on with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.kill_node import __main__ as campaign
from benchmarks.kill_node import cases
from benchmarks.kill_node.campaign import MOMENTS, Job
from benchmarks.kill_node.sent import sends_enough
from benchmarks.kill_node.training import Model
from tests.benchmarks.clusters import needs_cluster
from tests.support.campaign import campaign as campaign_only


def printed(folder: Path, main: Callable[[Sequence[str]], int], *arguments: str) -> str:
    """What a campaign prints in a fork of this process: it forks nodes, and waits for whatever child has ended."""
    output = folder / "printed"
    process = multiprocessing.get_context("fork").Process(target=_run, args=(output, main, arguments))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    assert process.exitcode == 0, output.read_text()[-4000:]
    return output.read_text()


def _run(output: Path, main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  # pytest has replaced them
    sys.exit(main(arguments))


@needs_cluster
@pytest.mark.parametrize(("shape", "losses"), [("2x1", 84), campaign_only("2x2", 168)])
def test_a_job_goes_on_after_five_deaths_with_the_same_bits(tmp_path: Path, shape: str, losses: int) -> None:
    job = ("--shapes", shape, "--partition", "2", "--kills", "5", "--quick")
    output = printed(tmp_path, campaign.main, *job, "--out", str(tmp_path))
    assert f"0 of {losses} losses differ, 0 ends" in output
    page = (tmp_path / "README.md").read_text()
    assert f"5 deaths: 0 of {losses} losses differ" in " ".join(page.split())
    assert (tmp_path / "recovery.svg").exists()


@pytest.mark.campaign
@needs_cluster
def test_a_job_whose_nodes_with_the_same_bytes_die_ends_at_once_with_its_launchers(tmp_path: Path) -> None:
    assert "wrong: nothing" in printed(tmp_path, cases.main, "--only", "1", "--out", str(tmp_path))
    page = (tmp_path / "README.md").read_text()
    assert "1 of 1 cases are as required" in page
    assert "NoWholeStepError: the job was started again, and no step can be resumed from" in page


@pytest.mark.parametrize(("size", "kib", "is_right"), [(4, 20, True), (4, 25, False), (8, 23, False), (8, 48, True)])
def test_ranks_send_what_no_other_node_has_and_no_more(size: int, kib: float, is_right: bool) -> None:
    job = Job(4, 2, size, width=64)
    assert job.parameters == sum(p.numel() for p in Model({"width": 64, "draws": True}, None).parameters())
    sent = {"sent_per_step": 1e6 + 8 * 2**10 * kib, "sent_per_step_without": 1e6}
    assert sends_enough({"job": asdict(job), **sent}) == is_right  # 12 bytes of 16705 parameters are 24.5 KiB of a rank


def test_a_campaign_has_all_moments_and_all_that_can_die() -> None:
    import random

    deaths = list(campaign.deaths_of(Job(4, 2, 4), 17, random.Random(0)))
    assert {death.moment for death in deaths} == set(MOMENTS)
    assert {death.what for death in deaths} == {"node", "rank", "keeper"}
    assert any(death.what == "node" and death.rank == 0 for death in deaths)
