"""The SLURM scripts, run with programs that only note how they are called, and the jobs of a sweep."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import submitit
from hydra.utils import instantiate

import train
from tests.support.configs import CONF, composed

ROOT = Path(train.__file__).parent
LAUNCH = ROOT / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))
SRUN = """#!/usr/bin/env bash
echo "srun $*"
echo $$ >"$(dirname "$0")/tasks"
env | sort >"$(dirname "$0")/environment"
if [[ "$*" == *wait=true* ]]; then
    trap 'echo stopped; exit "$STOPPED"' TERM
    echo running
    while true; do read -rt 0.05 <> <(:) || true; done
fi
exit 7
"""
SURVIVING_SRUN = """#!/usr/bin/env bash
cd "$(dirname "$0")"
kept="MASTER_ADDR=$MASTER_ADDR SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-} MICS_KEEPER_STARTED=$MICS_KEEPER_STARTED"
echo "$kept token=${#MICS_KEEPER_TOKEN} bad_exit=$SLURM_KILL_BAD_EXIT srun $*" >>calls
if [[ "$*" == *keeper ]]; then
    exec sleep 60
fi
next="$(head -n 1 deaths)" # status of this start, and the node that dies in it
sed -i 1d deaths
[[ "$next" == *" "* ]] && echo "${next#* }" >>dead
exit "${next% *}"
"""
SINFO = """#!/usr/bin/env bash
cat "$(dirname "$0")/dead"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$2" == hostnames ]]; then
    tr , "\n" <<<"$3"
elif [[ "$1" == show ]]; then
    echo "JobId=$3 PreemptEligibleTime=2026-11-25T07:00:00 PreemptTime=$PREEMPTED"
else
    echo "scontrol $*"
fi
"""
SCANCEL = """#!/usr/bin/env bash
if [[ "$*" == "--signal=TERM 42" ]]; then
    kill -TERM "$(cat "$(dirname "$0")/tasks")"
fi
"""


def fake_programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def asked(script: Path) -> dict[str, str]:
    """What a script asks of SLURM."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", script.read_text(), flags=re.MULTILINE))


def start(tmp_path: Path, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {
        "PATH": f"{fake_programs(tmp_path)}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": asked(script)["cpus-per-task"],
        "SLURM_JOB_ID": "42",
        "PREEMPTED": "None",
        "STOPPED": "0",
    }
    command = ["bash", str(script), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=variables | environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    check = subprocess.run([program, "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (check.stdout, check.stderr, check.returncode) == ("", "", 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_the_program_with_what_was_typed(tmp_path: Path, script: Path) -> None:
    run = start(tmp_path, script, "model=gpt2", "data.prompt=def f")
    output, _ = run.communicate(timeout=30)
    assert output == "srun python train.py model=gpt2 data.prompt=def f\n"
    assert run.returncode == 7  # the program's own
    cpus = asked(script)["cpus-per-task"]
    environment = (tmp_path / "bin" / "environment").read_text().splitlines()
    assert {
        "FI_EFA_USE_HUGE_PAGE=0",
        "NCCL_SOCKET_IFNAME=^lo,docker,veth",
        "NCCL_LAUNCH_ORDER_IMPLICIT=1",
        "NCCL_DEBUG=WARN",
        "SLURM_CPU_BIND=cores",
        "SLURM_DISTRIBUTION=block:block",
        "SLURM_KILL_BAD_EXIT=1",
        f"SRUN_CPUS_PER_TASK={cpus}",
        f"OMP_NUM_THREADS={cpus}",
    } <= set(environment)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("cluster/*_*.yaml")))
def test_a_script_asks_for_the_ranks_and_cores_of_its_clusters(name: str) -> None:
    cluster = composed(f"cluster={name}").cluster
    options = asked(ROOT / cluster.launch_script)
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == cluster.devices
    assert int(options["cpus-per-task"]) == cluster.cpus_per_rank


def test_a_job_that_was_queued_again_goes_on_where_it_was(tmp_path: Path) -> None:
    output, _ = start(tmp_path, SCRIPTS[0], "model=gpt2", SLURM_RESTART_COUNT="1").communicate(timeout=30)
    assert output == "srun python train.py model=gpt2 resume=auto\n"


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(tmp_path: Path) -> None:
    run = start(tmp_path, SCRIPTS[0], "wait=true")
    assert run.stdout is not None
    assert run.stdout.readline().startswith("srun ")
    assert run.stdout.readline() == "running\n"
    run.send_signal(signal.SIGUSR1)
    output, _ = run.communicate(timeout=30)
    assert output == "stopped\nscontrol requeue 42\n"
    assert run.returncode == 0


def test_a_job_that_fails_when_its_time_is_up_is_not_queued_again(tmp_path: Path) -> None:
    run = start(tmp_path, SCRIPTS[0], "wait=true", STOPPED="9")
    assert run.stdout is not None
    assert run.stdout.readline().startswith("srun ")
    assert run.stdout.readline() == "running\n"
    run.send_signal(signal.SIGUSR1)
    output, _ = run.communicate(timeout=30)
    assert (output, run.returncode) == ("stopped\n", 9)


def test_a_job_that_was_preempted_is_queued_again(tmp_path: Path) -> None:
    run = start(tmp_path, SCRIPTS[0], "model=gpt2", PREEMPTED="2026-11-25T07:10:00")
    output, _ = run.communicate(timeout=30)
    assert output == "srun python train.py model=gpt2\nscontrol requeue 42\n"


def surviving(tmp_path: Path, *deaths: str, **environment: str) -> tuple[int, list[str]]:
    """Exit status and calls of srun of a job of two nodes and a spare one, whose starts end so."""
    run = "strategy.in_memory_checkpoint=1"
    folder = tmp_path / "bin"
    nodes = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n1,n2,n3", "SLURM_NTASKS_PER_NODE": "8", "SPARES": "1"}
    folder.mkdir()
    for name, text in {"srun": SURVIVING_SRUN, "sinfo": SINFO}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "deaths").write_text("".join(f"{death}\n" for death in deaths))
    (folder / "dead").touch()
    more = tmp_path / "more"
    more.mkdir()
    variables = {"PATH": f"{folder}:{fake_programs(more)}:{os.environ['PATH']}", **nodes, **environment}
    status = start(tmp_path / "unused", SCRIPTS[0], "model=gpt2", run, **variables).wait(timeout=30)
    return status, (folder / "calls").read_text().splitlines()


KEEPERS = (
    "srun --overlap --no-kill --kill-on-bad-exit=0 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=1 "
    "--gpus-per-node=0 python -m lightning_mics keeper"
)


def trained(nodes: str, attempt: int, more: str = "") -> str:
    return (
        f"MASTER_ADDR={nodes[:2]} SLURM_RESTART_COUNT={attempt} MICS_KEEPER_STARTED=1 token=64 bad_exit=1 srun "
        f"--overlap --no-kill --nodes=2 --nodelist={nodes} --ntasks=16 env SLURM_NNODES=2 python train.py model=gpt2 "
        f"strategy.in_memory_checkpoint=1{more}"
    )


def test_a_spare_node_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    status, calls = surviving(tmp_path, "1 n1", "0")
    assert status == 0
    keepers = [call for call in calls if call.endswith("keeper")]
    assert keepers == [f"MASTER_ADDR=n1 SLURM_RESTART_COUNT= MICS_KEEPER_STARTED=1 token=64 bad_exit=0 {KEEPERS}"]
    assert [call for call in calls if call not in keepers] == [trained("n1,n2", 0), trained("n2,n3", 1)]


def test_ranks_that_die_are_started_again_on_their_nodes(tmp_path: Path) -> None:
    status, calls = surviving(tmp_path, "9", "9", "0", SLURM_RESTART_COUNT="2")
    assert status == 0
    starts = [trained("n1,n2", attempt, " resume=auto") for attempt in (2, 3, 4)]
    assert [call for call in calls if not call.endswith("keeper")] == starts


@pytest.mark.parametrize(
    ("deaths", "restarts"), [(("5", "6", "7"), "2"), (("5 n1", "7 n2"), "20")], ids=["too many", "too few nodes"]
)
def test_a_job_that_cannot_go_on_ends_with_the_status_of_its_last_start(
    tmp_path: Path, deaths: tuple[str, ...], restarts: str
) -> None:
    status, calls = surviving(tmp_path, *deaths, RESTARTS=restarts)
    assert status == 7
    assert len([call for call in calls if not call.endswith("keeper")]) == len(deaths)


def test_jobs_of_a_sweep_ask_slurm_for_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_programs(tmp_path)}:{os.environ['PATH']}")  # submitit looks for srun
    submitted = []

    def submit(executor: submitit.AutoExecutor, *_: object) -> list[object]:
        submitted.append(executor._executor._make_submission_file_text("TRAIN", "1"))
        return []

    monkeypatch.setattr("submitit.AutoExecutor.map_array", submit)
    overrides = ("hydra/launcher=slurm", "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path}", "cluster=p5_64")
    config = composed(*overrides)
    launcher = instantiate(config.hydra.launcher)
    launcher.config = config
    launcher.launch([["optimizer.lr=1e-3"], ["optimizer.lr=2e-3"]], initial_job_idx=0)
    (script,) = submitted
    lines = script.splitlines()
    assert {f"#SBATCH --{option}" for option in ("nodes=64", "ntasks-per-node=8", "gpus-per-node=8")} <= set(lines)
    assert {"#SBATCH --cpus-per-task=24", "#SBATCH --exclusive"} <= set(lines)
    (started,) = (index for index, line in enumerate(lines) if line.startswith("srun "))
    assert lines.index("source recipes/launch/environment.sh") < started
    assert f"--output {tmp_path}/.submitit/" in lines[started]
