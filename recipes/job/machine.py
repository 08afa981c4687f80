"""Checking that the launched job is the one that ``cluster=`` describes, or printing the commands that launch it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MANY = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes={nodes} --nproc-per-node={devices} "
    "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py"
)  # torch 2.13: restarted ranks share the store of the attempt before, and give up, without the variable


ONE = "torchrun --standalone --nproc-per-node={devices} train.py"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """The job as described by the launcher.

    Attributes:
        by: Name of the launcher, for display.
        nodes: Number of nodes; None if unknown.
        ranks_per_node: Processes on each node; None if unknown.
    """

    by: str
    nodes: int | None
    ranks_per_node: int | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launched:
        """Read the environment variables of torchrun, SLURM, or Lightning's own launcher."""
        if "TORCHELASTIC_RUN_ID" in environment:
            local = int(environment["LOCAL_WORLD_SIZE"])
            return cls(by="torchrun", nodes=int(environment["WORLD_SIZE"]) // local, ranks_per_node=local)
        if "SLURM_STEP_ID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            nodes = int(environment["SLURM_NNODES"])
            return cls(by="srun", nodes=nodes, ranks_per_node=int(environment["SLURM_NTASKS"]) // nodes)
        if "NODE_RANK" in environment and "MASTER_ADDR" in environment:  # one process per node; it starts the others
            return cls(by="Lightning", nodes=None, ranks_per_node=None)
        return cls(by="hand", nodes=1, ranks_per_node=None)


def check_machine(cluster: Mapping[str, Any], *, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
    """Exit with the commands to launch the job if this process is not part of the job that ``cluster`` describes.

    One process of each node prints them and fails; the others exit without an error, because a launcher that sees an
    error could kill the first process before it prints.

    Args:
        cluster: Configuration of the cluster, as in ``conf/cluster``.
        overrides: Arguments of ``train.py``.
        environment: Environment variables of the process.
    """
    message = _wrong_count(cluster)
    if message is None:
        problem = find_problem(cluster, Launched.read(environment), gpus=torch.cuda.device_count())
        message = problem and f"{problem}\n\n{how_to_launch(cluster, overrides=overrides)}"
    if message is not None:
        is_first = int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0))) == 0
        sys.exit(message if is_first else 0)


def _wrong_count(cluster: Mapping[str, Any]) -> str | None:
    nodes, devices = cluster["num_nodes"], cluster["devices"]
    if not isinstance(nodes, int) or nodes < 1:
        return f"cluster.num_nodes={nodes} must be a whole number of at least 1"
    if devices != "auto" and (not isinstance(devices, int) or devices < 1):
        return (
            f"cluster.devices={devices} must be auto or the number of GPUs of each node; to use certain ones, set "
            "CUDA_VISIBLE_DEVICES"
        )
    return None


def find_problem(cluster: Mapping[str, Any], launched: Launched, *, gpus: int) -> str | None:
    """Describe in a sentence how the launched job differs from the configuration; None if it does not.

    Args:
        cluster: Configuration of the cluster, as in ``conf/cluster``; ``devices: auto`` fits any number.
        launched: Job as described by the launcher.
        gpus: Number of GPUs of this machine.
    """
    nodes, devices = cluster["num_nodes"], cluster["devices"]
    there = []
    if launched.nodes not in (None, nodes):
        there.append(f"{launched.nodes} {_plural('node', launched.nodes)}, as started by {launched.by}")
    if devices != "auto" and launched.ranks_per_node not in (None, devices):
        there.append(f"{launched.ranks_per_node} {_plural('process', launched.ranks_per_node)} on each node")
    if cluster["accelerator"] == "gpu" and gpus < (1 if devices == "auto" else devices):
        there.append(f"{gpus or 'no'} {_plural('GPU', gpus)} on this machine")
    if not there:
        return None
    kind = f"{cluster['instance']} ({cluster['gpu']})" if cluster.get("instance") else "this kind"
    unit = "GPU" if cluster["accelerator"] == "gpu" else "process"
    wanted = f"{nodes} {_plural('node', nodes)} of {kind} with {devices} {_plural(unit, devices)} each"
    return f"The configuration is for {wanted}; there {'are' if there[0][0] != '1' else 'is'} {', and '.join(there)}."


def how_to_launch(cluster: Mapping[str, Any], *, overrides: Sequence[str]) -> str:
    """The commands that launch this job on its cluster, and the command that rehearses it on this machine.

    Args:
        cluster: Configuration of the cluster, as in ``conf/cluster``.
        overrides: Arguments of ``train.py``.
    """
    typed = "".join(f" {shlex.quote(override)}" for override in overrides)
    nodes, devices = cluster["num_nodes"], cluster["devices"]
    torchrun = (ONE if nodes == 1 else MANY).format(nodes=nodes, devices="gpu" if devices == "auto" else devices)
    where = "On that machine" if nodes == 1 else f"On each of the {nodes} nodes, with the first one's address as HOST"
    lines = [f"{where}:", f"  {torchrun}{typed}"]
    if cluster["launch_script"]:
        lines += ["Under SLURM:", f"  sbatch --nodes={nodes} {cluster['launch_script']}{typed}"]
    return "\n".join(
        [
            *lines,
            "To rehearse one of its ranks on this machine, without a GPU:",
            f"  python train.py{typed} dry_run=true",
        ]
    )


def _plural(noun: str, count: object) -> str:
    return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
