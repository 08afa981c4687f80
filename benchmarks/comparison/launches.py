"""One launch of the comparison: a system on an emulated cluster of its own, through all phases of its plan.

Everything of a launch is in one folder: ``plan.json``, ``rank{r}.json`` of each rank, ``node{n}.log`` of each node and,
when it has ended, ``outcome.json``. A launch whose outcome is good and whose plan is still the same is not repeated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.environments import python_of
from benchmarks.comparison.plan import Plan
from benchmarks.emulated_cluster import EmulatedCluster, Network, NodeOutcome

ROOT = Path(__file__).parents[2]
_GRACE_SECONDS = 10.0  # for the other nodes to fail by themselves and say why


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A cluster of equal nodes, written ``2x4``: two nodes of four ranks."""

    nodes: int
    ranks_per_node: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"2x4"`` -> two nodes of four ranks.

        Raises:
            ValueError: If it is no shape, or has fewer than two nodes.
        """
        nodes, _, ranks = text.partition("x")
        if not (nodes.isdigit() and ranks.isdigit() and int(nodes) >= 2 and int(ranks) >= 1):
            raise ValueError(f"shape={text!r} is no cluster; write NODESxRANKS with at least two nodes, such as 2x4")
        return cls(nodes=int(nodes), ranks_per_node=int(ranks))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is launched; ``purpose`` tells the plans of one round apart."""

    shape: Shape
    system: str
    purpose: str
    round: int
    plan: Plan

    def folder(self, out: Path) -> Path:
        """Where the launch's files are."""
        return out / "launches" / str(self.shape) / f"{self.purpose}-{self.round}" / self.system

    def __str__(self) -> str:
        return f"round {self.round + 1}, {self.shape}, {self.purpose}, {self.system}"


def is_finished(launch: Launch, out: Path) -> bool:
    """Whether this launch, with this plan, has ended well before."""
    folder = launch.folder(out)
    if not (folder / "outcome.json").exists():
        return False
    same_plan = (folder / "plan.json").read_text() == launch.plan.to_json()
    return same_plan and outcome_of(folder)["ok"]


def outcome_of(folder: Path) -> dict[str, Any]:
    """How the launch of a folder ended."""
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome


def perform(launch: Launch, out: Path, *, time_limit: float) -> dict[str, Any]:
    """Launch, wait, and write and return the outcome; a failure is an outcome too.

    Args:
        launch: What to launch.
        out: The comparison's folder.
        time_limit: Seconds after which the launch has failed.
    """
    folder = launch.folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(launch.plan.to_json())
    begun = time.monotonic()
    try:
        reason, log = _run(launch, folder, time_limit)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # the system's environment cannot be made
        reason, log = f"{type(error).__name__}: {error}", ""
    outcome = {
        "ok": reason is None,
        "reason": reason and without_paths(reason),
        "log": without_paths(log),
        "seconds": round(time.monotonic() - begun, 1),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "shape": asdict(launch.shape),
        "system": launch.system,
        "purpose": launch.purpose,
        "round": launch.round,
    }
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1))
    return outcome


def worker_command(launch: Launch, folder: Path) -> list[str]:
    """What each node runs."""
    worker = [str(python_of(launch.system)), "-m", "benchmarks.comparison.worker", "--system", launch.system]
    return [*worker, "--plan", str(folder / "plan.json"), "--out", str(folder)]


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip()[:12] + (" with uncommitted changes" if changed else "")


def without_paths(text: str) -> str:
    """``text`` without the places that files have on this machine only."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def _run(launch: Launch, folder: Path, time_limit: float) -> tuple[str | None, str]:
    """Return why the launch failed, if it did, and the end of the log that says most about it."""
    command = worker_command(launch, folder.resolve())
    with EmulatedCluster(launch.shape.nodes) as cluster:
        run = cluster.start(command, env={"PYTHONPATH": str(ROOT)}, logs=folder.resolve())
        rates = _WantedRates(folder, cluster.network, phases=len(launch.plan.phases))
        outcomes = run.wait(timeout=time_limit, grace=_GRACE_SECONDS, on_poll=rates.follow)
    if all(outcome.ok for outcome in outcomes):
        missing = [rank for rank in range(_world_size(launch)) if not (folder / f"rank{rank}.json").exists()]
        return (f"no results of ranks {missing}", outcomes[0].tail) if missing else (None, "")
    worst = _first_failure(outcomes)
    return str(worst), worst.tail


def _first_failure(outcomes: list[NodeOutcome]) -> NodeOutcome:
    """One that ended by itself, if there is any: the stopped ones do not know the reason."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    return next((outcome for outcome in failed if outcome.stopped is None), failed[0])


def _world_size(launch: Launch) -> int:
    return launch.shape.nodes * launch.shape.ranks_per_node


class _WantedRates:
    """Gives the links the rate that rank 0 asks for before each phase, and says when it is done."""

    def __init__(self, folder: Path, network: Network, *, phases: int) -> None:
        self._folder = folder
        self._network = network
        self._waiting = list(range(phases))

    def follow(self) -> None:
        """Do what has been asked for since last time."""
        while self._waiting and (wanted := self._folder / f"phase-{self._waiting[0]}.wanted").exists():
            rate_mbit = json.loads(wanted.read_text())
            self._network.set_rate(None if rate_mbit is None else f"{round(rate_mbit * 1000)}kbit")
            (self._folder / f"phase-{self._waiting.pop(0)}.ready").touch()
