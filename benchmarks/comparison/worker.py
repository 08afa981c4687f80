"""One node of a run: import a system once, fork the node's ranks, wait for them.

::

    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0 \
        python -m benchmarks.comparison.worker --system ddp --plan plan.json --out results

Every rank writes ``rank{r}.json`` into the folder of results: versions, notes, and for each phase the losses of all
steps and the seconds and bytes of those after warm-up. Before each phase, rank 0 writes ``phase-{i}.wanted`` with the
rate of the links in Mbit/s (or ``null``) and waits for ``phase-{i}.ready``; ``--no-orchestrator`` leaves that out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo  # not used: optimizers import it, once here instead of on every rank
import torch.distributed as dist

from benchmarks.comparison.job import Job, Recorder
from benchmarks.comparison.plan import Plan
from benchmarks.comparison.systems import System, resolve

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Node:
    """Where this worker is in the job, as its environment says."""

    nodes: int
    node_rank: int
    interface: str | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Node:
        """Read NNODES and NODE_RANK, and the link from GLOO_SOCKET_IFNAME.

        Raises:
            ValueError: If a variable is missing.
        """
        missing = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(environment)
        if missing:
            raise ValueError(f"the environment lacks {', '.join(sorted(missing))}; a worker is started once per node")
        return cls(
            nodes=int(environment["NNODES"]),
            node_rank=int(environment["NODE_RANK"]),
            interface=environment.get("GLOO_SOCKET_IFNAME"),
        )


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the ranks of this node are to do."""

    system: System
    plan: Plan
    out: Path
    orchestrated: bool
    versions: dict[str, str]  # by distribution


def main(arguments: list[str] | None = None) -> int:
    """Run this node's ranks; 0 if all of them succeed."""
    options = _parser().parse_args(arguments)
    node = Node.from_environment(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends the ranks
    torch.set_num_threads(1)  # before forking: threads do not survive it
    system = resolve(options.system)
    module = importlib.import_module(system.module)
    assignment = Assignment(
        system=system,
        plan=Plan.read(options.plan),
        out=options.out,
        orchestrated=not options.no_orchestrator,
        versions={package: version(package) for package in ("torch", *module.PACKAGES)},
    )
    assignment.out.mkdir(parents=True, exist_ok=True)
    return run_node(node, assignment, module)


def run_node(node: Node, assignment: Assignment, module: ModuleType) -> int:
    """Fork the ranks and wait; when one fails, kill the others."""
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_run_rank, args=(local_rank, node, assignment, module))
        for local_rank in range(assignment.plan.ranks_per_node)
    ]
    try:
        for process in ranks:
            process.start()
        return _wait_for(ranks)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def _wait_for(ranks: Sequence[BaseProcess]) -> int:
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            if process.exitcode:
                print(f"{process.name} ended with {process.exitcode}; ending the others", file=sys.stderr)
                return 1
    return 0


def _run_rank(local_rank: int, node: Node, assignment: Assignment, module: ModuleType) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    plan = assignment.plan
    world_size = node.nodes * plan.ranks_per_node
    rank = node.node_rank * plan.ranks_per_node + local_rank
    os.environ |= _torchrun_variables(rank, local_rank, world_size, node, plan)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    recorder = Recorder(
        plan,
        interface=node.interface if local_rank == 0 else None,
        meeting_place=assignment.out if assignment.orchestrated else None,
    )
    job = Job(plan=plan, rank=rank, local_rank=local_rank, world_size=world_size, recorder=recorder)
    module.train(assignment.system.setting, job)
    _write_results(job, assignment)
    dist.barrier()  # nobody closes connections that others still use
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # leaves out exit handlers that were the parent's, and gloo's threads, which may abort at exit


def _torchrun_variables(rank: int, local_rank: int, world_size: int, node: Node, plan: Plan) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(plan.ranks_per_node),
        "GROUP_RANK": str(node.node_rank),
    }


def _write_results(job: Job, assignment: Assignment) -> None:
    results = {
        "system": assignment.system.name,
        "versions": assignment.versions,
        "notes": job.notes,
        "phases": job.results(),
    }
    (assignment.out / f"rank{job.rank}.json").write_text(json.dumps(results, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run one node of a comparison.")
    parser.add_argument("--system", required=True, help="a name from benchmarks.comparison.systems")
    parser.add_argument("--plan", required=True, type=Path, help="JSON, see benchmarks/comparison/plan.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results, shared by all nodes")
    parser.add_argument(
        "--no-orchestrator", action="store_true", help="nobody sets the links' rate: do not wait for it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
