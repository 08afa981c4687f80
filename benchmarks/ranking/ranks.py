"""One rank of a launch.

It calibrates, lets the planner choose, and times the ways of all cells in turns; or it counts the bytes of given ways.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.comparison.workload import build_model
from benchmarks.link_counters import sent_values
from benchmarks.predictions import calibrated, measure_collectives
from benchmarks.ranking.cells import MICRO_BATCHES, MODEL, RANKS, SAMPLES, Cell, Way, batch_of, cells_of, workload
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import PartitionGroups, create_partition_groups
from lightning_mics.topology import Topology

LINK = "eth0"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of caches or sums on nodes
SHARE_STEPS = 4  # micro-steps of the ways with these
LONG = 1.0  # seconds: a step that takes as long is timed once in a turn, others twice


class Trainer:
    """The model under one way, on all ranks.

    To be let go before another is timed: each backward looks at the parameters of all models of its process.

    Args:
        way: Way to run it.
        groups: Groups of this rank.
    """

    def __init__(self, way: Way, groups: PartitionGroups) -> None:
        self.groups = groups
        self._way = way
        self._model = build_model(MODEL)
        self._schedule = shard_model(self._model, groups, communication=way.communication)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), fused=True)
        self._batches = [
            batch_of(way.micro_batch, rank=dist.get_rank(), index=index) for index in range(SAMPLES // way.micro_batch)
        ]
        self._train(self._batches[:2])
        self._train(self._batches)  # ranks meet where they did something else under the way before: see control_plane
        gc.collect()  # of those before it, and not while steps are timed

    def seconds_of_a_turn(self) -> list[float]:
        """Seconds of two optimizer steps, or of a long one; the same on all ranks."""
        first = self.seconds()
        return [first] if first > LONG else [first, self.seconds()]

    def seconds(self) -> float:
        """Seconds of an optimizer step, until all ranks have ended it."""
        return timed(lambda: self._train(self._batches))

    def link_bytes(self) -> float:
        """Bytes that a node's link sends in an optimizer step, the mean of the nodes."""
        before = read_at_rest()
        self._train(self._batches)
        sent = torch.tensor([float(read_at_rest() - before)])
        dist.all_reduce(sent)
        return float(sent) / RANKS

    def _train(self, batches: list[torch.Tensor]) -> None:
        for index, batch in enumerate(batches):
            with self._schedule.micro_step(boundary=index == len(batches) - 1):
                self._model(batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def read_at_rest() -> int:
    """Values that the node's link has sent, read while no rank of the node trains."""
    dist.barrier()
    sent = sent_values(LINK)
    dist.barrier()
    return sent


def timed(run: Callable[[], object]) -> float:
    """Seconds that the slowest rank takes; the same on all ranks."""
    dist.barrier()
    begin = time.perf_counter()
    run()
    seconds = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure_micro_step(groups: PartitionGroups, samples: int) -> float:
    """Seconds of a micro-step of all ranks at once, sharded over one rank each: nothing travels.

    Args:
        groups: Groups of partitions of one rank.
        samples: Samples of a micro-batch.
    """
    model = build_model(MODEL)
    schedule = shard_model(model, groups)
    batch = batch_of(samples, rank=dist.get_rank(), index=0)

    def train() -> None:
        with schedule.micro_step(boundary=False):
            model(batch).backward()

    train()
    return median(timed(train) for _ in range(5))


def start_trainers() -> Callable[[Way], Trainer]:
    """Join the default group; returns what makes the trainer of a way, with groups that are made once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gc.freeze()  # what is imported: it would be looked at again for each trainer

    @cache
    def groups_of(partition_size: int, hierarchical: bool | str) -> PartitionGroups:
        topology = Topology(world_size=RANKS, ranks_per_node=ranks_per_node(), partition_size=partition_size)
        return create_partition_groups(
            topology,
            device_type="cpu",
            hierarchical=hierarchical,  # type: ignore[arg-type]
            caches_on_nodes=True,  # of some of the ways that share them
        )

    return lambda way: Trainer(way, groups_of(way.partition_size, way.hierarchical))


def ranks_per_node() -> int:
    """Number of ranks on each node."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def measure_times(out: Path, *, turns: int, pairs: int, places: list[float]) -> None:
    """Calibrate, choose, and time; rank 0 writes what was found.

    Args:
        out: File to write, as JSON.
        turns: Times that each way is timed.
        pairs: Times that each choice is timed in turns with flat full sharding.
        places: Pretended memories; see :func:`~benchmarks.ranking.cells.cells_of`.
    """
    trainer = start_trainers()

    def say(*what: object) -> None:
        if dist.get_rank() == 0:
            print(*what, flush=True)

    whole = trainer(Way(RANKS, True, "never", "shard", max(MICRO_BATCHES))).groups
    alone = trainer(Way(1, False, "never", "shard", max(MICRO_BATCHES))).groups
    collectives = [_as_text(measure_collectives(whole)) for _ in range(turns)]
    compute = {micro: measure_micro_step(alone, micro) for micro in MICRO_BATCHES}
    hardware = from_first_rank(
        calibrated(collectives, nodes=RANKS // ranks_per_node(), ranks_per_node=ranks_per_node())
    )
    compute = from_first_rank(compute)
    cells = cells_of(workload(), hardware, compute, places)
    seconds: dict[Way, list[float]] = {way: [] for cell in cells for way in cell.timed}
    say(hardware, compute, len(seconds), "ways,", sum(max(c.timed.get(w, 0) for c in cells) for w in seconds), "s")
    for turn in range(turns):
        for way, times in seconds.items():
            times += trainer(way).seconds_of_a_turn()
        say("turn", turn + 1)
    paired: dict[tuple[Way, Way], list[tuple[float, float]]] = {}
    for both in dict.fromkeys((cell.chosen, cell.flat) for cell in cells if cell.chosen != cell.flat):
        ours, flat = map(trainer, both)
        paired[both] = [(ours.seconds(), flat.seconds()) for _ in range(pairs)]
        del ours, flat
        say(both[0], median(one / other for one, other in paired[both]))
    if dist.get_rank() == 0:
        found = [_cell(cell, seconds, paired.get((cell.chosen, cell.flat), [])) for cell in cells]
        found_hardware = {name: value for name, value in asdict(hardware).items() if name != "gpu"}
        everything: dict[str, Any] = {"hardware": found_hardware, "compute": compute, "cells": found}
        out.write_text(json.dumps(everything))
    leave()


def count_bytes(out: Path, ways: list[Way]) -> None:
    """Train each way and read the links; rank 0 writes what they carried.

    Args:
        out: File to write, as JSON.
        ways: Ways to run, beside full sharding with shares.
    """
    trainer = start_trainers()
    link = [
        {"way": asdict(way), "bytes": trainer(way).link_bytes()} for way in dict.fromkeys(ways + ways_with_shares())
    ]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(link))
    leave()


def leave() -> None:
    """Let all ranks end together."""
    dist.barrier()
    time.sleep(0.2)


def ways_with_shares() -> list[Way]:
    """Full sharding in stages with caches or sums of a share of the blocks on nodes."""
    micro = SAMPLES // SHARE_STEPS
    caches = [Way(RANKS, True, share or "never", "shard", micro) for share in SHARES]
    return [*caches, *(Way(RANKS, True, "never", share or "shard", micro) for share in SHARES)]


def from_first_rank(value: Any) -> Any:
    """The first rank's value."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _as_text(sizes: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(size): seconds for size, seconds in of.items()} for name, of in sizes.items()}


def _cell(cell: Cell, seconds: dict[Way, list[float]], pairs: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "capacity_bytes": cell.capacity_bytes,
        "fitting": cell.fitting,
        "chosen": asdict(cell.chosen),
        "flat": asdict(cell.flat),
        "pairs": pairs,
        "timed": [
            {"way": asdict(way), "predicted": predicted, "seconds": seconds[way]}
            for way, predicted in cell.timed.items()
        ],
    }


def main() -> None:
    """Be one rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking.ranks", description=__doc__)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--places", type=float, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bytes-of", type=Path, help="file of ways: count their bytes, and time nothing")
    options = parser.parse_args()
    if options.bytes_of:
        count_bytes(options.out, [Way(**way) for way in json.loads(options.bytes_of.read_text())])
    else:
        measure_times(options.out, turns=options.turns, pairs=options.pairs, places=options.places)


if __name__ == "__main__":
    main()
