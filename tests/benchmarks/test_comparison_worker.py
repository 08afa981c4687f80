from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.comparison import worker
from benchmarks.comparison.job import Job
from benchmarks.comparison.plan import Phase, Plan
from benchmarks.comparison.systems import resolve
from benchmarks.comparison.workload import Workload

PLAN = Plan(
    workload=Workload(layers=2, width=16, heads=2, vocabulary=64, sequence_length=8),
    ranks_per_node=2,
    optimizer="sgd",
    phases=(
        Phase(name="s=2", rate_mbit=None, micro_steps=2, warmup_steps=1, steps=2),
        Phase(name="s=3", rate_mbit=50.0, micro_steps=3, warmup_steps=0, steps=2),
    ),
)
NODES = 2
DEADLINE_SECONDS = 120


def environment(node_rank: int, port: int) -> dict[str, str]:
    return {
        "NNODES": str(NODES),
        "NODE_RANK": str(node_rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_workers(system: str, plan: Plan, out: Path, *arguments: str) -> list[int | None]:
    """Exit codes of a worker on each node; forked, since importing torch anew would take most of the time."""
    out.mkdir(parents=True)
    (out / "plan.json").write_text(plan.to_json())
    port = free_port()
    options = ["--system", system, "--plan", str(out / "plan.json"), "--out", str(out), *arguments]
    nodes = [
        multiprocessing.get_context("fork").Process(target=worker_main, args=(environment(node, port), options))
        for node in range(NODES)
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(DEADLINE_SECONDS)
        node.kill()
        node.join()
    return [node.exitcode for node in nodes]


def worker_main(variables: dict[str, str], options: list[str]) -> None:
    os.environ |= variables
    raise SystemExit(worker.main(options))


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(NODES * PLAN.ranks_per_node)]


def losses(out: Path) -> list[list[float]]:
    return [[loss for phase in rank["phases"] for loss in phase["losses"]] for rank in results(out)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "ddp"
    assert run_workers("ddp", PLAN, out, "--no-orchestrator") == [0, 0]
    return out


def test_every_rank_writes_what_was_measured(ddp: Path) -> None:
    for rank, result in enumerate(results(ddp)):
        assert result["system"] == "ddp"
        assert "torch" in result["versions"]
        assert [phase["name"] for phase in result["phases"]] == ["s=2", "s=3"]
        for phase, record in zip(PLAN.phases, result["phases"], strict=True):
            assert len(record["losses"]) == phase.warmup_steps + phase.steps
            assert len(record["seconds"]) == phase.steps
            assert min(record["seconds"]) > 0
            if rank % PLAN.ranks_per_node == 0:
                assert record["sent_bytes"] > 0
            else:
                assert record["sent_bytes"] is None


def test_ranks_have_data_of_their_own_and_learn(ddp: Path) -> None:
    by_rank = losses(ddp)
    assert len({tuple(rank) for rank in by_rank}) == len(by_rank)
    mean_by_step = [sum(step) / len(by_rank) for step in zip(*by_rank, strict=True)]
    assert mean_by_step[-1] < mean_by_step[0] - 0.01  # else equal losses would show nothing


@pytest.mark.parametrize("system", ["fsdp2-hybrid-deferred@node", "mics-once-per-step@world", "mics-trainer@node"])
def test_losses_are_those_of_ddp_and_ours_accounts_for_its_bytes(system: str, ddp: Path, tmp_path: Path) -> None:
    assert run_workers(system, PLAN, tmp_path / "run", "--no-orchestrator") == [0, 0]
    for rank, reference in zip(losses(tmp_path / "run"), losses(ddp), strict=True):
        assert rank == pytest.approx(reference, abs=1e-5)
    first_of_node, second_of_node, *_ = results(tmp_path / "run")
    counts_itself = system.startswith("mics")
    assert all((phase["accounted_bytes"] is not None) == counts_itself for phase in first_of_node["phases"])
    assert all(phase["accounted_bytes"] is None for phase in second_of_node["phases"])


def test_each_phase_waits_for_the_links_to_have_its_rate(tmp_path: Path) -> None:
    out, wanted = tmp_path / "run", []

    def orchestrate() -> None:
        for index in range(len(PLAN.phases)):
            file, deadline = out / f"phase-{index}.wanted", time.monotonic() + DEADLINE_SECONDS
            while not file.exists() and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            wanted.append(json.loads(file.read_text()))
            (out / f"phase-{index}.ready").touch()

    orchestrator = threading.Thread(target=orchestrate)
    orchestrator.start()
    assert run_workers("ddp", PLAN, out) == [0, 0]
    orchestrator.join()
    assert wanted == [None, 50.0]


def test_a_rank_that_fails_ends_its_node(tmp_path: Path) -> None:
    def train(setting: str | None, job: Job) -> None:
        if job.rank == 1:
            raise RuntimeError("no memory left")
        dist.barrier()  # nobody else comes: only being killed ends this

    node = worker.Node(nodes=1, node_rank=0, interface=None)
    assignment = worker.Assignment(
        system=resolve("ddp"), plan=replace(PLAN, ranks_per_node=2), out=tmp_path, orchestrated=False, versions={}
    )
    variables = environment(0, free_port())
    process = multiprocessing.get_context("fork").Process(
        target=run_node_main, args=(variables, node, assignment, SimpleNamespace(train=train))
    )
    process.start()
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 1
    assert not list(tmp_path.glob("rank*.json"))


def run_node_main(variables: dict[str, str], node: Any, assignment: Any, module: Any) -> None:
    os.environ |= variables
    raise SystemExit(worker.run_node(node, assignment, module))


def test_a_worker_says_what_its_environment_lacks() -> None:
    with pytest.raises(ValueError, match="the environment lacks MASTER_PORT, NODE_RANK"):
        worker.Node.from_environment({"NNODES": "2", "MASTER_ADDR": "127.0.0.1"})
