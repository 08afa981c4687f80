"""What in-memory checkpoints cost a step: the same job with and without them, in turns, where steps wait for links.

python -m benchmarks.kill_node.cost --shape 4x2 --partition 4 --width 512 --rate 100mbit --rounds 5 \
    --out benchmarks/results/survival/cost
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.host_time import geometric_mean_with_interval
from benchmarks.kill_node.campaign import Campaign, Job
from benchmarks.kill_node.diaries import Diaries
from benchmarks.kill_node.nodes import preload

WARM_UP = 4  # steps


def step_seconds(diaries: Diaries) -> list[float]:
    """Times between the ends of two steps on rank 0, after some to warm up."""
    ends = [line["time"] for line in diaries.lines()[0] if line["event"] == "done"][WARM_UP:]
    return [after - before for before, after in itertools.pairwise(ends)]


def measured(job: Job, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a step and bytes that all nodes send in one, with and without, in turns.

    Args:
        job: The job.
        rounds: Number of runs of each.
    """
    found = []
    for number in range(rounds):
        folder = Path(tempfile.mkdtemp(prefix="kill-node-cost-"))
        campaign, of_round = Campaign(job, folder), {}
        ways = {"without": None, "with": 1}
        for name in ways if number % 2 == 0 else reversed(ways):
            with campaign.running(
                name, in_memory_checkpoint=ways[name], validate_every=job.steps, rest_at=(WARM_UP - 1, job.steps)
            ) as run:
                sent = run.sent_per_step()
                run.finish()
                of_round[name] = {"seconds": statistics.median(step_seconds(run.diaries)), "sent_bytes": sent}
        print(of_round, flush=True)
        found.append(of_round)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_node.cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="4x2", help="nodes x ranks per node (default: 4x2)")
    parser.add_argument("--partition", type=int, default=4, help="partition size (default: 4)")
    parser.add_argument("--width", type=int, default=512, help="of the model (default: 512)")
    parser.add_argument("--rate", default="100mbit", help="of each link (default: 100mbit)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    nodes, ranks = map(int, options.shape.split("x"))
    preload()
    job = Job(nodes, ranks, options.partition, steps=24, width=options.width, rate=options.rate)
    found = measured(job, options.rounds)
    ratio = geometric_mean_with_interval([of["with"]["seconds"] / of["without"]["seconds"] for of in found])
    more = statistics.median(of["with"]["sent_bytes"] - of["without"]["sent_bytes"] for of in found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(
        json.dumps({"rounds": found, "ratio": ratio, "more_bytes": more}, indent=1)
    )
    rows = "\n".join(
        f"| {number} | {of['without']['seconds']:.3f} | {of['with']['seconds']:.3f} "
        f"| {of['without']['sent_bytes'] / 1e6:.2f} | {of['with']['sent_bytes'] / 1e6:.2f} |"
        for number, of in enumerate(found, 1)
    )
    (options.out / "README.md").write_text(
        f"""# What in-memory checkpoints cost a step

**Question.** How much longer does a step take with `in_memory_checkpoint=1`, where steps wait for links, and how much
more do nodes send?

**Method.** The job of `benchmarks.kill_node` without deaths and validations, {job}, width {job.width}, links of
{job.rate}, with and without in turns. Medians of {job.steps - WARM_UP - 1} steps.

**Result.** A step takes {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}, 95 %) of the time without. All nodes send
{more / 2**10:.0f} KiB more per step, {more / 2**10 / job.world_size:.1f} KiB per rank.

**Date.** {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.kill_node.cost {" ".join(typed)}
```

| round | s without | s with | MB of all nodes without | with |
|--:|--:|--:|--:|--:|
{rows}
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
