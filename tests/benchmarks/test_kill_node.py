"""Nodes, ranks and keepers die in a job on an emulated cluster, and it goes on with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.kill_node.__main__ import deaths_of
from benchmarks.kill_node.campaign import MOMENTS, Job
from tests.benchmarks.clusters import needs_cluster

ROOT = Path(__file__).parents[2]


@needs_cluster
def test_a_job_goes_on_after_five_deaths_with_the_same_bits(tmp_path: Path) -> None:
    """In a process of its own, which forks nodes and must not be pytest."""
    command = [sys.executable, "-m", "benchmarks.kill_node", "--shapes", "2x2", "--partition", "2", "--kills", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 of 224 losses differ, 0 ends" in done.stdout
    page = (tmp_path / "README.md").read_text()
    assert "5 deaths: 0 of 224 losses differ" in " ".join(page.split())
    assert (tmp_path / "recovery.svg").exists()


def test_a_campaign_has_all_moments_and_all_that_can_die() -> None:
    import random

    deaths = list(deaths_of(Job(4, 2, 4), 17, random.Random(0)))
    assert {death.moment for death in deaths} == set(MOMENTS)
    assert {death.what for death in deaths} == {"node", "rank", "keeper"}
    assert any(death.what == "node" and death.rank == 0 for death in deaths)
