"""What in-memory checkpoints send between nodes: the same job with and without them, read where all ranks rest.

python -m benchmarks.kill_node.sent --shapes 4x2 2x4 --partition 2 4 8 --out benchmarks/results/survival/bytes

The exit status says whether it is what has to be sent. With replicas: at most 24 KiB of a rank per step, what no
replica has. With one replica: K P / N bytes of a node more (K = 12 bytes per parameter, P parameters, N nodes), within
2 %, beside those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.kill_node.campaign import Campaign, Job
from benchmarks.kill_node.nodes import preload

STATE_BYTES = 12  # per parameter: float32 and two states of AdamW
PRIVATE_BYTES = 24 * 2**10  # that a rank may send per step, of what no other has
TOLERANCE = 0.02  # of the states that have to be sent
FIRST = 3  # step after which links are read first: what is sent once was sent before


def bounds_of(job: dict[str, Any]) -> tuple[float, float]:
    """The least and the most bytes that a rank must and may send more per step.

    Args:
        job: The job, as plain data.
    """
    own = Job(**job)
    states = STATE_BYTES * own.parameters / own.world_size if own.partition_size == own.world_size else 0.0
    return (1 - TOLERANCE) * states, (1 + TOLERANCE) * states + PRIVATE_BYTES


def more_bytes(found: dict[str, Any]) -> float:
    """Bytes that a rank sends more per step, on average.

    Args:
        found: What was found for a job.
    """
    ranks = found["job"]["nodes"] * found["job"]["ranks_per_node"]
    return float(found["sent_per_step"] - found["sent_per_step_without"]) / ranks


def sends_enough(found: dict[str, Any]) -> bool:
    """Whether ranks send what they have to, and no more; true where nothing was compared.

    Args:
        found: What was found for a job.
    """
    if "sent_per_step_without" not in found:
        return True
    least, most = bounds_of(found["job"])
    return least <= more_bytes(found) <= most


def more_in_words(found: dict[str, Any]) -> str:
    """The KiB that a rank sends more per step, and how many it may.

    Args:
        found: What was found for a job.
    """
    if "sent_per_step_without" not in found:
        return "-"
    return f"{more_bytes(found) / 2**10:.1f} ({bounds_of(found['job'])[1] / 2**10:.1f})"


def sent_by(job: Job, folder: Path, *, steps: int) -> dict[str, float]:
    """Bytes that all nodes send per step, with and without in-memory checkpoints.

    Args:
        job: The job.
        folder: Folder for its files.
        steps: Optimizer steps that are counted.
    """
    counted = replace(job, steps=FIRST + steps, rest_at=(FIRST, FIRST + steps))
    campaign, found = Campaign(counted, folder), {}
    for name, every in (("sent_per_step", 1), ("sent_per_step_without", None)):
        with campaign.running(name, in_memory_checkpoint=every) as run:
            found[name] = run.sent_per_step()
            run.finish()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_node.sent", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4x2", "2x4"], help="nodes x ranks per node")
    parser.add_argument("--partition", nargs="+", type=int, default=[2, 4, 8], help="partition sizes")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps that are counted (default: 50)")
    parser.add_argument("--width", type=int, default=256, help="of the model (default: 256)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    results = []
    preload()
    for shape in options.shapes:
        nodes, ranks = map(int, shape.split("x"))
        for size in options.partition:
            job, folder = Job(nodes, ranks, size, width=options.width), Path(tempfile.mkdtemp(prefix="kill-node-sent-"))
            results.append({"job": asdict(job), **sent_by(job, folder, steps=options.steps)})
            shutil.rmtree(folder)
            print(f"{job}: {more_in_words(results[-1])} KiB more of a rank per step (at most)", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "README.md").write_text(_page(typed, options.steps, results))
    return 0 if all(map(sends_enough, results)) else 1


def _page(typed: Sequence[str], steps: int, results: Sequence[dict[str, Any]]) -> str:
    job = Job(**results[0]["job"])
    rows = "\n".join(_row(found) for found in results)
    return f"""# What in-memory checkpoints send between nodes

**Question.** How many bytes do nodes send more with `in_memory_checkpoint=1`?

**Method.** The job of `benchmarks.kill_node` without deaths, {job.parameters} parameters, with and without
in-memory checkpoints. Counters of all links, with the headers of packets and what launchers and keepers send by
themselves, are read after two steps, {steps} steps apart, after which all ranks rest: what is sent before the first
one, such as to measure the links, is not in them. Allowed are 24 KiB of a rank for what no replica has, and, with one
replica, {STATE_BYTES} bytes per parameter, divided by all ranks, within {TOLERANCE:.0%}.

**Result.** {sum(map(sends_enough, results))} of {len(results)} jobs send what is allowed. Measured.

**Date.** {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.kill_node.sent {" ".join(typed)}
```

| nodes x ranks, partition size | KiB of a rank per step without | with | more | at least | at most |
|---|--:|--:|--:|--:|--:|
{rows}
"""


def _row(found: dict[str, Any]) -> str:
    job = Job(**found["job"])
    sent = [found[name] / job.world_size / 2**10 for name in ("sent_per_step_without", "sent_per_step")]
    least, most = (bound / 2**10 for bound in bounds_of(found["job"]))
    return f"| {job} | {sent[0]:.1f} | {sent[1]:.1f} | {sent[1] - sent[0]:.1f} | {least:.1f} | {most:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
