"""A job that is not the one ``cluster=`` asks for stops, and says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import train
from recipes.job.machine import Launched, check_machine, find_problem, how_to_launch
from tests.support.configs import CONF, composed

CLUSTER = {
    "num_nodes": 4,
    "devices": 8,
    "accelerator": "gpu",
    "instance": "p4d.24xlarge",
    "gpu": "A100 40 GB",
    "launch_script": "recipes/launch/p4d.sbatch",
}


LOCAL = {"num_nodes": 1, "devices": "auto", "accelerator": "cpu", "instance": None, "launch_script": None}


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "32",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, {"NODE_RANK": "3", "MASTER_ADDR": "host"}])
def test_the_right_job_goes_on(environment: dict[str, str]) -> None:
    assert find_problem(CLUSTER, Launched.read(environment), gpus=8) is None


@pytest.mark.parametrize("environment", [{}, TORCHRUN | {"WORLD_SIZE": "8"}])
def test_on_one_machine_whatever_is_there_is_right(environment: dict[str, str]) -> None:
    assert find_problem(LOCAL, Launched.read(environment), gpus=0) is None


@pytest.mark.parametrize(
    ("environment", "gpus", "there"),
    [
        ({}, 0, "there is 1 node, as started by hand, and no GPUs on this machine."),
        (TORCHRUN | {"WORLD_SIZE": "16"}, 8, "there are 2 nodes, as started by torchrun."),
        (
            TORCHRUN | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"},
            4,
            "there are 4 processes on each node, and 4 GPUs on this machine.",
        ),
        (SRUN | {"SLURM_NNODES": "2", "SLURM_NTASKS": "16"}, 8, "there are 2 nodes, as started by srun."),
        (TORCHRUN, 1, "there is 1 GPU on this machine."),
    ],
)
def test_what_is_there_is_named(environment: dict[str, str], gpus: int, there: str) -> None:
    problem = find_problem(CLUSTER, Launched.read(environment), gpus=gpus)
    assert problem == f"The configuration is for 4 nodes of p4d.24xlarge (A100 40 GB) with 8 GPUs each; {there}"


def test_commands_hold_what_the_user_has_typed() -> None:
    lines = how_to_launch(CLUSTER, overrides=["model=gpt2", "data.prompt=def f"]).splitlines()
    typed = "model=gpt2 'data.prompt=def f'"
    assert lines == [
        "On each of the 4 nodes, with the first one's address as HOST:",
        "  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d "
        "--rdzv-endpoint=HOST:29500 train.py " + typed,
        "Under SLURM:",
        f"  sbatch --nodes=4 recipes/launch/p4d.sbatch {typed}",
        "To rehearse one of its ranks on this machine, without a GPU:",
        f"  python train.py {typed} dry_run=true",
    ]
    assert "torchrun --standalone --nproc-per-node=gpu train.py" in how_to_launch(LOCAL, overrides=[])


def test_one_rank_of_each_node_speaks_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    wrong = TORCHRUN | {"WORLD_SIZE": "16"}
    with pytest.raises(SystemExit, match="torchrun"):
        check_machine(CLUSTER, overrides=[], environment=wrong)
    with pytest.raises(SystemExit) as stop:
        check_machine(CLUSTER, overrides=[], environment=wrong | {"LOCAL_RANK": "1"})
    assert stop.value.code == 0  # torchrun ends all of a node when it sees one fail


@pytest.mark.parametrize(
    "wrong", [{"devices": [0, 2]}, {"devices": "0,2"}, {"devices": -1}, {"num_nodes": 0}, {"num_nodes": "auto"}]
)
def test_counts_are_counts(wrong: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match=rf"cluster\.{next(iter(wrong))}=.* must be"):
        check_machine(CLUSTER | wrong, overrides=[], environment=TORCHRUN)


@pytest.mark.parametrize("path", sorted(CONF.glob("cluster/*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_has_all_facts_and_its_launch_script(path: Path) -> None:
    cluster = composed(f"cluster={path.stem}").cluster
    assert set(cluster) == set(composed().cluster)
    if path.stem == "local":
        return
    name, _, nodes = path.stem.rpartition("_")
    assert cluster.num_nodes == int(nodes)
    assert cluster.instance.split(".")[0] == name
    optional = {"ranks_per_node", "in_node_nccl_tests", "network_nccl_tests"}
    assert all(value is not None for key, value in cluster.items() if key not in optional)
    assert (Path(train.__file__).parent / cluster.launch_script).is_file()


def test_the_program_ends_with_the_message_and_without_a_traceback(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, train.__file__, "model=gpt-100b", "cluster=p4d_64", f"run_dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert f"python train.py model=gpt-100b cluster=p4d_64 run_dir={tmp_path} dry_run=true" in run.stderr
    assert "Traceback" not in run.stderr
