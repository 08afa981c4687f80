"""Stands in for a system's worker: the same files and the same rates, but it only sends bytes; run once per node.

python fake_worker.py --system NAME --plan PLAN.json --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script, in a process of its own

from benchmarks.link_counters import sent_bytes

BYTES = 200_000  # sent by each node in each step
PORT = 7100
NODE, NODES = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def meet(out: Path, where: str) -> None:
    """Wait until every node is here."""
    (out / f"{where}-{NODE}.here").touch()
    until(lambda: all((out / f"{where}-{node}.here").exists() for node in range(NODES)))


def exchange(server: socket.socket) -> None:
    with socket.create_connection((f"node{(NODE + 1) % NODES}", PORT)) as sending:
        receiving, _ = server.accept()
        sending.sendall(bytes(BYTES))
        sending.shutdown(socket.SHUT_WR)
        with receiving:
            while receiving.recv(1 << 16):
                pass
        sending.recv(1)  # the other node closes when it has everything


def train(phase: dict[str, Any], index: int, out: Path, server: socket.socket) -> dict[str, Any]:
    if NODE == 0:
        (out / "draft").write_text(json.dumps(phase["rate_mbit"]))
        (out / "draft").rename(out / f"phase-{index}.wanted")
    until((out / f"phase-{index}.ready").exists)
    meet(out, f"phase-{index}")
    before, seconds = sent_bytes("eth0"), []
    for _ in range(phase["steps"]):
        begun = time.perf_counter()
        exchange(server)
        seconds.append(time.perf_counter() - begun)
    losses = [5.0 - step / 10 for step in range(phase["warmup_steps"] + phase["steps"])]
    sent = sent_bytes("eth0") - before
    accounted = BYTES * phase["steps"]
    return {
        "name": phase["name"],
        "losses": losses,
        "seconds": seconds,
        "sent_bytes": sent,
        "accounted_bytes": accounted,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--system", "--plan", "--out"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    if options.system.startswith("deepspeed"):
        raise SystemExit(f"no {options.system} in {Path(__file__).parents[2]}")
    plan, out = json.loads(Path(options.plan).read_text()), Path(options.out)
    with socket.create_server(("", PORT)) as server:
        meet(out, "start")
        phases = [train(phase, index, out, server) for index, phase in enumerate(plan["phases"])]
    for local in range(plan["ranks_per_node"]):
        own = [{**each, "sent_bytes": None, "accounted_bytes": None} if local else each for each in phases]
        results = {"system": options.system, "versions": {"fake": "1.2"}, "notes": ["as | is"], "phases": own}
        (out / f"rank{NODE * plan['ranks_per_node'] + local}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
