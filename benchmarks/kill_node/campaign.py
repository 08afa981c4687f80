"""One job whose nodes die again and again, beside the same job undisturbed."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.emulated_cluster import EmulatedCluster
from benchmarks.emulated_cluster.network import Network
from benchmarks.kill_node.diaries import Diaries, first_line
from benchmarks.kill_node.nodes import Nodes

MOMENTS = ("any", "copy", "unprotected", "optimizer", "validation", "window", "fetch", "first step", "recovery")
MOMENTS_WITH_DISK = ("any", "save", "optimizer", "validation", "window", "fetch", "first step")
AFTER_A_DEATH = ("first step", "recovery")  # moments that come after another death
MOST_SECONDS = 90.0  # until a death or a recovery that should have come
POLL_SECONDS = 0.01
LAST_CALL_SECONDS = 10  # for the first start of a job that fewer nodes could begin
REST_SECONDS = 1.0  # until what is sent beside the training has arrived


@dataclass(frozen=True)
class Job:
    """A job on some nodes.

    Attributes:
        nodes: Number of nodes.
        ranks_per_node: Ranks on each.
        partition_size: Ranks of a partition group.
        steps: Optimizer steps.
        micro_steps: Micro-steps of each.
        width: Width of the model.
        validate_every: Optimizer steps between validations.
        in_memory_checkpoint: Option of the strategy.
        save_every: Optimizer steps between checkpoints on a disk that all nodes share; None is none.
        imports: Whether ranks that start import everything; else they are forked from a process that has.
        rate: Rate of each link, such as ``"200mbit"``; None is unshaped.
        least_nodes: Fewest nodes with which the launchers go on; None is all.
        samples: Samples of an optimizer step, whatever the number of ranks; None is four per rank and micro-step.
        draws: Whether the training draws random numbers, which other numbers of ranks do not share.
        rest_at: Optimizer steps after which ranks wait until their links have been read. Such a job does not choose its
            caches by how fast links are: it would send other bytes each time.
    """

    nodes: int
    ranks_per_node: int
    partition_size: int
    steps: int = 60
    micro_steps: int = 2
    width: int = 64
    validate_every: int = 5
    in_memory_checkpoint: int | None = 1
    save_every: int | None = None
    imports: bool = False
    rate: str | None = None
    least_nodes: int | None = None
    samples: int | None = None
    draws: bool = True
    rest_at: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return 4 * (self.width**2 + self.width) + self.width + 1

    @property
    def most_lost(self) -> int:
        """Steps, done by all ranks, that a death may cost: the checkpoint that it interrupts is not there."""
        return 2 * self.save_every if self.save_every else 1

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}, partition size {self.partition_size}"


@dataclass(frozen=True)
class Death:
    """A death that is ordered.

    Attributes:
        moment: One of :data:`MOMENTS`.
        what: ``"node"``, ``"rank"`` or ``"keeper"``.
        rank: Rank that must have reached the moment, and whose node it is.
    """

    moment: str
    what: str
    rank: int


@dataclass
class Outcome:
    """What came of a death; times in seconds after it.

    Attributes:
        death: The death.
        moment_step: Optimizer steps done when it came.
        done: Optimizer steps that all ranks had done.
        resumed: Step that the job resumed from.
        most_lost: Steps that may be lost.
        seconds: Time until each part of going on: ``noticed`` (first rank), ``started`` (last process), ``loaded``,
            ``protected``, ``step`` (a new step is done on all ranks).
    """

    death: Death
    moment_step: int
    done: int
    resumed: int
    most_lost: int = 1
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, death: Death, diaries: Diaries, *, most_lost: int = 1) -> Outcome:
        """What is known when a death comes.

        Args:
            death: The death.
            diaries: What the ranks have written until now.
            most_lost: Steps that may be lost.
        """
        done = diaries.steps_done()
        return cls(death, max(done), min(done), -1, most_lost)

    @property
    def ok(self) -> bool:
        """Whether no more steps were lost than may be."""
        return self.resumed >= self.done - self.most_lost


class Campaign:
    """A job on an emulated cluster with a node that stands by.

    Args:
        job: The job.
        folder: Folder for its files.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._numbers = iter(range(10**6))

    @contextmanager
    def running(self, name: str, **options: Any) -> Iterator[Run]:
        """A run of the job, whose processes are gone afterwards.

        Args:
            name: Name of its folder.
            options: Options of the job that are other ones in this run.
        """
        folder = self._folder / name
        folder.mkdir(parents=True)
        job = replace(self._job, **options)
        content = {**asdict(job), "folder": str(folder), "workers": 1}
        environment = {
            "KILL_NODE_OPTIONS": json.dumps(content),
            "MICS_KEEPER_TOKEN": secrets.token_hex(16),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONUNBUFFERED": "1",
        }
        with EmulatedCluster(self._job.nodes + 2, rate=self._job.rate) as cluster:
            nodes = Nodes(cluster, logs=folder, environment=environment)
            run = Run(job, nodes, folder, self._numbers, cluster.network)
            nodes.start_store()
            for node in range(self._job.nodes + 1 if not self._job.imports else 0):
                nodes.stand_by(node)
            try:
                for node in range(self._job.nodes):
                    run.launch(node)
                yield run
            finally:
                for node in range(self._job.nodes + 2):
                    cluster.network.kill_node(node)
                while _reaped():
                    pass


class Run:
    """A run that goes on.

    Attributes:
        job: The job.
        diaries: What its ranks have written.
        standby: Node that stands by.
        statuses: Exit statuses of the launchers that have ended, by node.
    """

    def __init__(self, job: Job, nodes: Nodes, folder: Path, numbers: Iterator[int], network: Network) -> None:
        self.job = job
        self.nodes = nodes
        self.folder = folder
        self.diaries = Diaries(folder, job.world_size)
        self.network = network
        self._numbers = numbers
        self.standby = self._standby_before = job.nodes
        self.statuses: dict[int, int] = {}

    def launch(self, node: int) -> None:
        """Start torchrun on a node."""
        job = self.job
        self.nodes.launch(
            node,
            [
                *("--nnodes", f"{job.least_nodes or job.nodes}:{job.nodes}"),
                *("--nproc-per-node", str(job.ranks_per_node), "--max-restarts", "1000"),
                *([] if job.imports else ["-m", "lightning_mics", "warm"]),
                *("-m", "benchmarks.kill_node.training"),
            ],
            imports=job.imports,
            last_call_seconds=LAST_CALL_SECONDS if job.least_nodes else 1,
        )

    def wait(self, ready: Callable[[], Any], what: str, *, seconds: float = MOST_SECONDS) -> Any:
        """Wait until ``ready`` returns something.

        Args:
            ready: Function that returns something once it is so.
            what: What is waited for, for the error.
            seconds: Longest time.

        Raises:
            TimeoutError: If it does not come.
        """
        until = time.monotonic() + seconds
        while True:
            if found := ready():
                return found
            self.statuses.update(self.nodes.ended())
            if time.monotonic() > until:
                raise TimeoutError(f"{self.job}: {what} did not come within {seconds:g} s; see {self.folder}")
            time.sleep(POLL_SECONDS)

    def wait_for_step(self, step: int) -> None:
        """Wait until all ranks have done an optimizer step."""
        self.wait(lambda: min(self.diaries.steps_done()) >= step, f"step {step}")

    def finish(self, *, besides: Sequence[int] = ()) -> dict[int, int]:
        """Wait until the job has ended; returns the statuses of the launchers by node.

        Args:
            besides: Nodes that are no part of the job any more.
        """
        self.wait(lambda: self.nodes.launchers.keys() <= set(besides), "the end", seconds=4 * MOST_SECONDS)
        return {node: status for node, status in self.statuses.items() if node not in besides}

    def sent_per_step(self) -> float:
        """Bytes that all nodes send per optimizer step between the two at which ranks rest, with headers of packets.

        What a job sends before its first step, such as to measure its links, is not in it.
        """
        first, last = self.job.rest_at
        sent = []
        for step in (first, last):
            rest = partial(self.diaries.on_all, "rest", self.diaries.world_size * [0.0], step=step)
            self.wait(rest, f"the rest after step {step}")
            time.sleep(REST_SECONDS)
            sent.append(sum(link.sent_bytes for link in self.network.counters()[: self.job.nodes + 1]))
            (self.folder / f"rested-{step}").touch()
        return (sent[1] - sent[0]) / (last - first)

    def keepers(self) -> list[int]:
        """Processes of keepers on all nodes."""
        return [process for node in range(self.job.nodes + 1) for process in self.nodes.keepers(node)]

    def cut(self, rank: int, *, after: int) -> Outcome:
        """Pull the cable of a rank's node, and have another take its place when its launcher may join; see :meth:`die`.

        Args:
            rank: The rank.
            after: Step that must be done before.
        """
        self.wait_for_step(after)
        node, cut = self.node_of(rank), time.time()
        self.network.cut(node)
        self.launch(self.standby)
        outcome = Outcome.of(Death("any", "cable", rank), self.diaries)
        self.wait_for_recovery(outcome, cut)
        self.nodes.kill(node)
        return outcome

    def replace_dead(self, nodes: Sequence[int]) -> None:
        """Have empty nodes take the places of dead ones: the one that stands by, and dead ones that are up again."""
        self.launch(self.standby)
        for node in nodes:
            self.nodes.stand_by(node)
        for node in nodes[:-1]:
            self.launch(node)
        self.standby = nodes[-1]

    def die(self, death: Death, chance: random.Random, *, after: int) -> Outcome:
        """Kill what is ordered when it has reached its moment, and wait until the job goes on.

        Args:
            death: The order.
            chance: Random numbers.
            after: Step that must be done before.
        """
        self.wait_for_step(after)
        if death.moment in AFTER_A_DEATH:  # the new node dies: any other might hold the only bytes that are left
            self._order(death, node=self.standby)
            self._kill(Death("any", "node", death.rank))
            self._wait_for_order(death)
            death = replace(death, rank=self._rank_on(self._standby_before))
        elif death.moment == "any":
            time.sleep(chance.uniform(0.0, 0.5))
        else:
            self._order(death)
            self._wait_for_order(death)
        killed = self._kill(death)
        outcome = Outcome.of(death, self.diaries, most_lost=self.job.most_lost)
        self.wait_for_recovery(outcome, killed)
        return outcome

    def _order(self, death: Death, *, node: int | None = None) -> None:
        """Order a rank, or any rank of a node, to stop at a moment."""
        self._ordered = next(self._numbers)
        order = {"number": self._ordered, "moment": death.moment, "rank": death.rank}
        if node is not None:
            order["node"] = f"node{node}"
        draft = self.folder / "order.draft"
        draft.write_text(json.dumps(order))
        draft.rename(self.folder / "order.json")

    def _wait_for_order(self, death: Death) -> None:
        begun = self.folder / f"begun-{self._ordered}"
        self.wait(begun.exists, f"moment {death.moment!r} of rank {death.rank}")

    def place(self, rank: int) -> dict[str, Any]:
        """Where a rank runs now."""
        return next(line for line in reversed(self.diaries.lines()[rank]) if line["event"] == "start")

    def node_of(self, rank: int) -> int:
        """Number of the node that a rank runs on now."""
        return int(self.place(rank)["node"].removeprefix("node"))

    def _rank_on(self, node: int) -> int:
        return next(rank for rank in range(self.job.world_size) if self.place(rank)["node"] == f"node{node}")

    def _kill(self, death: Death) -> float:
        """Kill what is ordered, and have another node take the place of a dead one; returns when."""
        node, killed = self.node_of(death.rank), time.time()
        if death.what == "node":
            self.nodes.kill(node)
            self.launch(self.standby)
            if not self.job.imports:
                self.nodes.stand_by(node)
            self._standby_before, self.standby = self.standby, node
        elif death.what == "rank":
            os.kill(self.place(death.rank)["process"], signal.SIGKILL)
        else:
            self.nodes.kill_keeper(node)
        return killed

    def wait_for_recovery(self, outcome: Outcome, killed: float, *, saves_again: bool = True) -> None:
        """Wait until all ranks have done a step after a death, and note when each part of it was done.

        Args:
            outcome: What came of the death, which is filled in.
            killed: Time of the death, seconds since the epoch.
            saves_again: Whether the step is saved again before the next one, as it is for as many ranks as before.
        """
        since = [killed] * self.diaries.world_size
        for event, name in (
            ("start", "started"),
            ("agreed", "agreed"),
            *([("protected again", "protected")] if saves_again and not self.job.save_every else []),
            ("loaded", "loaded"),
            ("done", "step"),
        ):
            what = f"{name} after {outcome.death}"
            found = self.wait(partial(self.diaries.on_all, event, since), what)
            since = [line["time"] for line in found]
            outcome.seconds[name] = max(since) - killed
            if event == "agreed":
                outcome.resumed = int(found[0]["step"])
        noticed = [line["time"] for lines in self.diaries.lines() if (line := first_line(lines, "noticed", killed))]
        outcome.seconds["noticed"] = min(noticed, default=killed) - killed


def _reaped() -> bool:
    try:
        return bool(os.waitpid(-1, os.WNOHANG)[0])
    except ChildProcessError:
        return False
