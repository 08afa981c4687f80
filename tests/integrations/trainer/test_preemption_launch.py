"""Jobs that torchrun and SLURM stop: they save, exit with status 0 and resume from there."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.support import preempted_script
from tests.support.forked import run_ranks
from tests.support.launching import free_port, reports, torchrun

pytestmark = pytest.mark.launch
SCRIPT = str(preempted_script.__file__)


def test_a_torchrun_job_resumes_where_sigterm_stopped_it(tmp_path: Path) -> None:
    with torchrun(tmp_path, SCRIPT, str(tmp_path), "-1") as job:
        assert job.stdout.readline() == "training\n"
        job.terminate()
        _, errors = job.wait(timeout=30)
    stopped = reports(tmp_path)
    assert stopped[0] == stopped[1], errors[-3000:]
    assert stopped[0]["first"] == 0 and stopped[0]["last"] >= 3 and stopped[0]["stopped"]
    assert (tmp_path / "code-None").exists()
    assert "Signal 6" not in errors and "SIGABRT" not in errors

    step = stopped[0]["last"]
    with torchrun(tmp_path, SCRIPT, str(tmp_path), str(step + 2), "last") as job:
        status, errors = job.wait(timeout=240)
    assert status == 0, errors[-3000:]
    assert reports(tmp_path) == [{"first": step, "last": step + 2, "stopped": False}] * 2


def slurm(folder: Path, **more: str) -> Any:
    port = str(free_port())

    def environment(rank: int) -> dict[str, str]:
        return {
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NNODES": "1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PATH": f"{folder}:{os.environ['PATH']}",
            **more,
        }

    return environment


def fake_scontrol(folder: Path, script: str) -> None:
    command = folder / "scontrol"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


class Usr1(Callback):
    """Sends SLURM's signal to rank 1 in the first micro-step of the second window."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


def _until_queued_again(folder: Path) -> list[str]:
    write = FileSystemWriter.write_data

    def list_and_write(*args: Any) -> Any:
        (folder / "seen_while_writing").write_text(" ".join(path.name for path in folder.iterdir()))
        return write(*args)

    FileSystemWriter.write_data = list_and_write  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True, action="always") as warned, pytest.raises(SIGTERMException):
        preempted_script.main(str(folder), "-1", None, Usr1(), accumulate_grad_batches=2)
    return [str(warning.message) for warning in warned if "SLURM job" in str(warning.message)]


def _resumed(folder: Path) -> None:
    preempted_script.main(str(folder), "5", accumulate_grad_batches=2)  # Lightning finds the checkpoint by itself


@pytest.mark.filterwarnings("ignore:.*srun.*")
@pytest.mark.parametrize(
    ("more", "job"), [({}, "4711"), ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3")]
)
def test_a_slurm_job_is_saved_and_then_requeued(more: dict[str, str], job: str, tmp_path: Path) -> None:
    fake_scontrol(tmp_path, f'echo "$@" > {tmp_path}/asked; ls {tmp_path}/hpc_ckpt_1.ckpt > {tmp_path}/saved_before')
    run = run_ranks(2, _until_queued_again, tmp_path, init_group=False, env=slurm(tmp_path, **more))
    assert run == [[], []]
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    assert "manifest.json" in (tmp_path / "saved_before").read_text().split()
    # Lightning takes any name like this for a checkpoint to resume, and a job may be killed while it writes
    seen = (tmp_path / "seen_while_writing").read_text()
    assert "requeue.ckpt" in seen and "hpc_ckpt_" not in seen
    assert reports(tmp_path) == [{"first": 0, "last": 3, "stopped": True}] * 2  # read a step later

    run_ranks(2, _resumed, tmp_path, init_group=False, env=slurm(tmp_path, **more))
    assert reports(tmp_path) == [{"first": 3, "last": 5, "stopped": False}] * 2


@pytest.mark.filterwarnings("ignore:.*srun.*")
@pytest.mark.parametrize(
    ("scontrol", "problem"),
    [
        ("echo requeue is disabled >&2; exit 1", "requeue is disabled"),
        (None, "[Errno 2] No such file or directory: 'scontrol'"),
    ],
)
def test_a_slurm_job_that_cannot_be_requeued_is_saved_and_warns(
    scontrol: str | None, problem: str, tmp_path: Path
) -> None:
    if scontrol is not None:
        fake_scontrol(tmp_path, scontrol)
    environment = slurm(tmp_path, PATH=str(tmp_path))
    warned = run_ranks(2, _until_queued_again, tmp_path, init_group=False, env=environment)
    assert warned == [
        [f"SLURM job 4711 was saved but not requeued: `scontrol requeue 4711`: {problem}"],
        [],
    ]
    assert (tmp_path / "hpc_ckpt_1.ckpt" / "manifest.json").exists()
