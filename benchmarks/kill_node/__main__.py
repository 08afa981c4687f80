"""Kill nodes, ranks and keepers of a job that trains, again and again, and see that it goes on with the same bits.

python -m benchmarks.kill_node --shapes 4x2 2x4 --partition 2 4 8 --kills 100 --seed 0 --out benchmarks/results/survival

Nodes are network namespaces of this machine, joined by links; it needs root, and iproute2. For each shape and partition
size the job runs once undisturbed, and once with deaths: at moments that are ordered, where the victim says that it has
begun and waits, or at any. Another node, which stands by with everything imported, takes the place of a dead one. What
has to be equal: the losses of all ranks at all micro-steps, also of those that are computed twice, weights, optimizer
states and random number generators at the end. The exit status says whether it was so.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.kill_node.campaign import MOMENTS, MOMENTS_WITH_DISK, Campaign, Death, Job, Run
from benchmarks.kill_node.nodes import preload
from benchmarks.kill_node.page import write_page
from benchmarks.kill_node.sent import sends_enough, sent_by

STEPS_PER_DEATH, STEPS_PER_QUICK_DEATH = 4, 3
STEPS_BETWEEN_SAVES = 2  # on a disk
STEPS_COUNTED = 20  # of which bytes are compared
SLOW_SECONDS = 15.0  # from a death to the next step, after which logs are kept


def deaths_of(job: Job, count: int, chance: random.Random) -> Iterator[Death]:
    """The deaths of one job: all moments in turn, mostly of nodes.

    Args:
        job: The job.
        count: Number of deaths.
        chance: Random numbers.
    """
    moments = list(MOMENTS_WITH_DISK) if job.save_every else [*MOMENTS, "any", "any"]
    for number in range(count):
        moment, rank = moments[number % len(moments)], chance.randrange(job.world_size)
        if number % len(moments) == 0 and number:  # a certain node: the first one
            rank = 0
        others = {} if job.save_every else {len(MOMENTS): "rank", len(MOMENTS) + 1: "keeper"}
        what = others.get(number % len(moments), "node")
        yield Death(moment, what, rank)


def run_job(
    job: Job,
    deaths: Sequence[Death],
    chance: random.Random,
    folder: Path,
    *,
    cut: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Run a job undisturbed and with deaths, and compare.

    Args:
        job: The job.
        deaths: The deaths, in their order.
        chance: Random numbers.
        folder: Folder for its files.
        cut: Whether the cable of the last node is pulled after the deaths, without a word to connections.
        quick: Whether the undisturbed run is beside the other one, which then takes longer to recover, and bytes
            between nodes are not compared with those without in-memory checkpoints, which takes two runs more.

    Returns:
        What was found, as plain data.
    """
    campaign = Campaign(job, folder)
    found: dict[str, Any] = {"job": asdict(job), "statuses": [], "keepers_left": 0, "files_left": []}
    outcomes = []
    with ExitStack() as runs:
        calm = runs.enter_context(campaign.running("undisturbed"))
        if not quick:
            _finish(calm, found)
            runs.close()
            if not job.save_every:
                found |= sent_by(job, folder, steps=STEPS_COUNTED)
        run = runs.enter_context(campaign.running("disturbed"))
        after = 2
        for death in deaths:
            outcome = run.die(death, chance, after=after)
            print(f"{job}: {outcome}", flush=True)
            outcomes.append({**asdict(outcome), "ok": outcome.ok})
            after = outcome.resumed + 2
        if cut:
            outcome = run.cut(job.world_size - 1, after=after)
            print(f"{job}: {outcome}", flush=True)
            outcomes.append({**asdict(outcome), "ok": outcome.ok})
        if quick:
            _finish(calm, found)
        _finish(run, found)
    found |= calm.diaries.differences(run.diaries)
    found["disk_bytes"] = max(
        line["disk_bytes"] for lines in run.diaries.lines() for line in lines if "disk_bytes" in line
    )
    found["outcomes"] = outcomes
    print(f"{job}: {found['different_losses']} of {found['losses']} losses differ, {found['different_ends']} ends")
    return found


def _finish(run: Run, found: dict[str, Any]) -> None:
    """Wait until a run has ended, and note how, and what it has left behind."""
    found["statuses"] += run.finish().values()
    found["keepers_left"] += len(run.keepers())
    found["files_left"] += run.nodes.files_left()


def is_ok(found: dict[str, Any]) -> bool:
    """Whether a job went on as it should."""
    equal = not (found["different_losses"] or found["different_ends"] or any(found["statuses"]))
    left = found["keepers_left"] or found["files_left"]
    return equal and not left and sends_enough(found) and all(outcome["ok"] for outcome in found["outcomes"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign and write its page; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_node", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4x2", "2x4"], help="nodes x ranks per node")
    parser.add_argument("--partition", nargs="+", type=int, default=[2, 4, 8], help="partition sizes")
    parser.add_argument("--kills", type=int, default=100, help="deaths in all (default: 100)")
    parser.add_argument("--disk", action="store_true", help="resume from a ModelCheckpoint instead; nodes die only")
    parser.add_argument("--imports", action="store_true", help="ranks import everything when they start")
    parser.add_argument("--cut", action="store_true", help="also pull the cable of a node, in each job")
    parser.add_argument(
        "--quick", action="store_true", help="count no bytes, and run the undisturbed job beside the other"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--out", type=Path, help="folder of the page and the numbers; without it nothing is written")
    options = parser.parse_args(typed)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    jobs = [(nodes, ranks, size) for nodes, ranks in shapes for size in options.partition]
    chance, results = random.Random(options.seed), []
    preload()
    for number, (nodes, ranks, size) in enumerate(jobs):
        count = options.kills * (number + 1) // len(jobs) - options.kills * number // len(jobs)
        steps = (STEPS_PER_QUICK_DEATH if options.quick else STEPS_PER_DEATH) * (count + 1 + options.cut)
        job = Job(nodes, ranks, size, steps=steps)
        job = replace(job, imports=options.imports)
        if options.disk:
            job = replace(job, in_memory_checkpoint=None, save_every=STEPS_BETWEEN_SAVES)
        folder = Path(tempfile.mkdtemp(prefix="kill-node-"))  # stays if it fails
        results.append(
            run_job(job, list(deaths_of(job, count, chance)), chance, folder, cut=options.cut, quick=options.quick)
        )
        slow = [outcome["seconds"]["step"] for outcome in results[-1]["outcomes"]]
        if max(slow, default=0.0) <= SLOW_SECONDS:
            shutil.rmtree(folder)
        else:
            print(f"a recovery took {max(slow):.1f} s: logs are in {folder}", flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.json").write_text(json.dumps(results, indent=1))
            write_page(options.out, typed, results)
    return 0 if all(map(is_ok, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
