"""What a system is given on each rank, and the recorder that it tells where phases begin and steps end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.comparison.plan import Phase, Plan
from benchmarks.comparison.workload import Workload, micro_batch
from benchmarks.link_counters import sent_bytes

ORCHESTRATOR_SECONDS = 120  # to shape the links of all nodes
POLL_SECONDS = 0.05


@dataclass
class PhaseRecord:
    """What a rank's result file says of one phase; bytes are those of its node, during the measured steps."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent_bytes: int | None = None
    accounted_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Bytes:
    """What a node has sent so far."""

    on_link: int
    accounted: int


class Recorder:
    """Measures phases: losses of all steps, seconds and bytes of those after warm-up.

    Args:
        plan: The run's plan.
        interface: The node's link, whose counters are read; None on all ranks of a node but one.
        meeting_place: A folder shared with an orchestrator that sets the links' rate; None without one.
    """

    def __init__(self, plan: Plan, *, interface: str | None, meeting_place: Path | None) -> None:
        self.records: list[PhaseRecord] = []
        self.account: Callable[[], float] | None = None  # the system's own count of bytes the node has sent
        self._plan = plan
        self._interface = interface
        self._meeting_place = meeting_place
        self._measures_from = 0.0  # time.perf_counter
        self._bytes_before = _Bytes(on_link=0, accounted=0)

    def begin_phase(self, index: int) -> None:
        """Call on every rank before the phase's first step."""
        phase = self._plan.phases[index]
        dist.barrier()
        if self._meeting_place is not None:
            if dist.get_rank() == 0:
                _await_links(self._meeting_place, index, phase)
            dist.barrier()
        self.records.append(PhaseRecord(phase.name))
        if phase.warmup_steps == 0:
            self._begin_measuring()

    def finish_step(self, loss: float) -> None:
        """Call on every rank after each optimizer step, with the mean loss over this rank's micro-batches."""
        now, record = time.perf_counter(), self.records[-1]
        phase = self._plan.phases[len(self.records) - 1]
        record.losses.append(loss)
        done = len(record.losses)
        if done > phase.warmup_steps:
            record.seconds.append(now - self._measures_from)
            self._measures_from = now
        if done == phase.warmup_steps:
            self._begin_measuring()
        elif done == phase.all_steps:
            self._finish_measuring(record)

    def _begin_measuring(self) -> None:
        self._bytes_before = self._bytes_now()
        self._measures_from = time.perf_counter()

    def _finish_measuring(self, record: PhaseRecord) -> None:
        now, before = self._bytes_now(), self._bytes_before
        if self._interface is not None:
            record.sent_bytes = now.on_link - before.on_link
            record.accounted_bytes = None if self.account is None else now.accounted - before.accounted

    def _bytes_now(self) -> _Bytes:
        dist.barrier()  # all that was sent has arrived
        now = _Bytes(
            on_link=0 if self._interface is None else sent_bytes(self._interface),
            accounted=0 if self.account is None else round(self.account()),
        )
        dist.barrier()  # nobody sends again before it is read
        return now


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's share of a run."""

    plan: Plan
    rank: int
    local_rank: int
    world_size: int
    recorder: Recorder
    notes: list[str] = field(default_factory=list)  # what the result should say of how the system was set

    @property
    def workload(self) -> Workload:
        """What is trained."""
        return self.plan.workload

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.plan.ranks_per_node

    @property
    def nodes(self) -> int:
        """Nodes in the job."""
        return self.world_size // self.ranks_per_node

    def micro_batch(self, *, step: int, micro_step: int) -> Tensor:
        """This rank's tokens; ``step`` counts optimizer steps over all phases."""
        return micro_batch(self.workload, step=step, micro_step=micro_step, rank=self.rank)

    def results(self) -> list[dict[str, Any]]:
        """The phases so far, as the result file has them."""
        return [vars(record) for record in self.recorder.records]


def _await_links(meeting_place: Path, index: int, phase: Phase) -> None:
    """Ask the orchestrator for the phase's rate, and wait until the links have it."""
    wanted, ready = (meeting_place / f"phase-{index}.{word}" for word in ("wanted", "ready"))
    draft = wanted.with_suffix(".draft")
    draft.write_text("null" if phase.rate_mbit is None else str(phase.rate_mbit))
    draft.rename(wanted)  # appears with its content
    deadline = time.monotonic() + ORCHESTRATOR_SECONDS
    while not ready.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no {ready} within {ORCHESTRATOR_SECONDS} s; is the orchestrator alive? "
                "Use --no-orchestrator where there is none"
            )
        time.sleep(POLL_SECONDS)
