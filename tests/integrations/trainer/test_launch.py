"""Ranks started by Lightning, by torchrun and by SLURM find each other and train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch_script
from tests.support.forked import run_ranks
from tests.support.launching import LAUNCHERS, free_port, reports, torchrun

pytestmark = pytest.mark.launch
SCRIPT = str(launch_script.__file__)


def run(*command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    finished = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def check(ranks: list[dict[str, Any]], *, nodes: int, environment: str, by_lightning: list[bool]) -> None:
    assert [rank["world size"] for rank in ranks] == [2, 2]
    assert [(rank["nodes"], rank["partition groups"]) for rank in ranks] == [(nodes, nodes)] * 2
    assert [(rank["node"], rank["local rank"]) for rank in ranks] == (
        [(0, 0), (1, 0)] if nodes == 2 else [(0, 0), (0, 1)]
    )
    assert [rank["environment"] for rank in ranks] == [environment] * 2
    assert [rank["started by Lightning"] for rank in ranks] == by_lightning
    assert [rank["steps"] for rank in ranks] == [2, 2]
    assert ranks[0]["loss"] == ranks[1]["loss"] > 0
    assert ranks[0]["weight"] == ranks[1]["weight"] != 7.0  # as it was before training


def test_lightning_starts_the_ranks_itself(tmp_path: Path) -> None:
    run(SCRIPT, str(tmp_path))
    check(
        reports(tmp_path), nodes=1, environment="LightningEnvironment", by_lightning=[True, False]
    )  # it started the second


def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    with torchrun(tmp_path, SCRIPT, str(tmp_path)) as job:
        status, errors = job.wait(timeout=240)
    assert status == 0, errors[-3000:]
    check(reports(tmp_path), nodes=1, environment="TorchElasticEnvironment", by_lightning=[False, False])


@pytest.mark.filterwarnings("ignore:.*srun.*")
def test_slurm_starts_the_ranks_on_two_nodes(tmp_path: Path) -> None:
    port = free_port()

    def environment(rank: int) -> dict[str, str]:
        return {
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(rank),
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    run_ranks(2, launch_script.main, str(tmp_path), "1", "2", init_group=False, env=environment)
    check(reports(tmp_path), nodes=2, environment="SLURMEnvironment", by_lightning=[False, False])
