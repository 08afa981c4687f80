"""From the folders of launches to one ``results.json`` with every raw number, and what machine they come from."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.comparison.launches import outcome_of
from benchmarks.comparison.systems import System, resolve

RESULTS = "results.json"
_DIGITS = 9  # of a loss: what fp32 holds


def write_results(out: Path, facts: Mapping[str, object], folders: Iterable[Path]) -> None:
    """Write ``results.json``: ``facts`` about the comparison, and the launches of ``folders``, one per line."""
    launches = ",\n".join(json.dumps(_launch(folder)) for folder in folders)
    head = json.dumps(dict(facts), indent=1).removesuffix("\n}")
    written = out / f"{RESULTS}.new"
    written.write_text(f'{head},\n "launches": [\n{launches}\n]}}\n')
    written.rename(out / RESULTS)


def machine() -> dict[str, object]:
    """What a reader must know of this machine to judge the numbers."""
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_kib = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "processor": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory_kib[1]) / 2**20) if memory_kib else None,
        "kernel": platform.release().split("-")[0],
        "tcp": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
    }


def _launch(folder: Path) -> dict[str, Any]:
    outcome = outcome_of(folder)
    nodes, ranks_per_node = outcome["shape"]["nodes"], outcome["shape"]["ranks_per_node"]
    system = resolve(outcome["system"])
    launch = {**outcome, "shape": f"{nodes}x{ranks_per_node}", "reach": _reach(system), "keeps": system.keeps}
    if not outcome["ok"]:
        return launch
    plan = json.loads((folder / "plan.json").read_text())
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nodes * ranks_per_node)]
    return {
        **launch,
        "optimizer": plan["optimizer"],
        "versions": ranks[0]["versions"],
        "notes": ranks[0]["notes"],
        "phases": [
            {**phase, **_phase([rank["phases"][index] for rank in ranks], ranks_per_node)}
            for index, phase in enumerate(plan["phases"])
        ],
    }


def _phase(ranks: list[dict[str, Any]], ranks_per_node: int) -> dict[str, Any]:
    """One phase: lists by rank for what each rank has, by node for what a node's first rank has."""
    first_ranks = ranks[::ranks_per_node]
    return {
        "seconds": [[round(seconds, 6) for seconds in rank["seconds"]] for rank in ranks],
        "losses": [[float(f"{loss:.{_DIGITS}g}") for loss in rank["losses"]] for rank in ranks],
        "sent_bytes": [rank["sent_bytes"] for rank in first_ranks],
        "accounted_bytes": [rank["accounted_bytes"] for rank in first_ranks],
    }


def _reach(system: System) -> str:
    """How far the model states of one replica reach: a node, two nodes, or the world."""
    if system.setting is not None and "@" in system.setting:
        return system.setting.rpartition("@")[2]
    return "node" if system.name == "ddp" else "world"
