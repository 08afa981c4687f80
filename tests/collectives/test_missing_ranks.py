"""A collective that times out says which ranks were missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics.collectives.watcher import RollCall, missing
from tests.support.forked import run_ranks
from tests.support.models import TinyLM, tokens

LIMIT, RANKS, LATE = timedelta(seconds=3), 4, 1


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(8)


def trained(store: Path, delay: Callable[[], None]) -> tuple[str, float]:
    """Error of a step in which one rank does not come, and the seconds until it is raised."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=LIMIT)
    processes: list[Any] = [None] * RANKS
    dist.all_gather_object(processes, os.getpid())
    topology = Topology(world_size=RANKS, ranks_per_node=2, partition_size=4)
    model = TinyLM()
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu", timeout=LIMIT))
    for step in range(2):
        begun = time.monotonic()
        if step and rank == LATE:
            delay()
        try:
            with schedule.micro_step(boundary=True):
                model(tokens(2)).backward()
        except RuntimeError as error:
            if delay is stopped and rank != LATE:
                time.sleep(2)  # until all have called the roll
                os.kill(processes[LATE], signal.SIGCONT)
            return f"{type(error).__name__}: {error}", time.monotonic() - begun
    return "nothing was raised", 0.0


@pytest.mark.parametrize(
    ("delay", "words"),
    [
        (stopped, "MissingRanksError: rank 1 does not answer: it has died, is stopped, or its node cannot be reached."),
        (asleep, "MissingRanksError: rank 1 is at "),
    ],
    ids=["stopped", "asleep"],
)
def test_the_rank_that_did_not_come_is_named(delay: Callable[[], None], words: str, tmp_path: Path) -> None:
    found = run_ranks(RANKS, trained, tmp_path / "store", delay, init_group=False, env=lambda rank: {"RANK": str(rank)})
    for rank, (error, seconds) in enumerate(found):
        if rank != LATE:
            assert error.startswith(words), error
            assert seconds < 10
    assert any("Timed out waiting" in error for error, _ in found)


def test_what_is_said_of_who_answers() -> None:
    def said(**answers: str) -> str:
        roll = RollCall([1, 2, 3], number=1, answers={int(rank[1:]): place for rank, place in answers.items()})
        return missing(roll, rank=0, doing="a")

    assert said(r1="a", r2="a", r3="a").startswith("all ranks answer, and are at the same place: the network")
    assert said(r1="a").startswith("rank 2 (like 3) do not answer: they have died, are stopped, or their node")
    assert said(r1="b", r2="a", r3="b") == "rank 1 (like 3) is at b, while rank 0 is at a"
    assert missing(RollCall([1]), rank=0, doing="a").startswith("the job's store does not answer")
