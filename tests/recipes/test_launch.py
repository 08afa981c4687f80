"""The SLURM scripts, run with programs that only note how they are called."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from hydra.utils import instantiate

import train
from tests.recipes.test_configs import composed

ROOT = Path(train.__file__).parent
SCRIPTS = sorted((ROOT / "recipes" / "launch").glob("*.sbatch"))
SRUN = """#!/usr/bin/env bash
echo "srun $* | $FI_PROVIDER $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS"
if [[ "$*" == *wait=true* ]]; then
    trap 'echo saved; exit 0' TERM
    echo running
    while true; do read -rt 0.05 <> <(:) || true; done
fi
exit 7
"""


def start(tmp_path: Path, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/usr/bin/env bash\necho "scontrol $*"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "42"}
    command = ["bash", str(script), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=variables | environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_the_program_with_what_was_typed(tmp_path: Path, script: Path) -> None:
    run = start(tmp_path, script, "model=gpt2", "data.prompt=def f")
    output, _ = run.communicate(timeout=30)
    assert (
        output
        == "srun --cpu-bind=cores --kill-on-bad-exit=1 python train.py model=gpt2 data.prompt=def f | efa 12 12\n"
    )
    assert run.returncode == 7  # the program's own
    tasks = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --ntasks-per-node=8")]
    assert len(tasks) == 1


def test_a_job_that_was_queued_again_goes_on_where_it_was(tmp_path: Path) -> None:
    output, _ = start(tmp_path, SCRIPTS[0], "model=gpt2", SLURM_RESTART_COUNT="1").communicate(timeout=30)
    assert "train.py model=gpt2 resume=auto |" in output


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(tmp_path: Path) -> None:
    run = start(tmp_path, SCRIPTS[0], "wait=true")
    assert run.stdout is not None
    assert run.stdout.readline().startswith("srun ")
    assert run.stdout.readline() == "running\n"
    run.send_signal(signal.SIGUSR1)
    output, _ = run.communicate(timeout=30)
    assert output == "saved\nscontrol requeue 42\n"
    assert run.returncode == 0


def test_jobs_of_a_sweep_ask_slurm_for_the_cluster() -> None:
    launcher = composed("hydra/launcher=slurm", "hydra.mode=MULTIRUN", "model=gpt2", "cluster=p4d_16").hydra.launcher
    asked = instantiate(launcher).params
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (16, 8, 8)
    assert asked["submitit_folder"].startswith("outputs/sweeps/")
