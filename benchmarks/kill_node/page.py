"""The page of results of a campaign, with a picture of one recovery."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.kill_node.sent import more_in_words

PARTS = ("noticed", "started", "agreed", "protected", "step")
WORDS = {
    "noticed": "the first rank notices",
    "started": "all ranks run again",
    "agreed": "the step is agreed on, groups and model are made",
    "protected": "it is loaded, and on two nodes again",
    "step": "the next step is done",
}


def write_page(out: Path, arguments: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """Write the page and its picture.

    Args:
        out: Folder of the page.
        arguments: Arguments of the command.
        results: What was found for each job.
    """
    outcomes = [outcome for found in results for outcome in found["outcomes"]]
    _draw(out / "recovery.svg", outcomes)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lost = [outcome["done"] - outcome["resumed"] for outcome in outcomes]
    table = "\n".join(_row(found) for found in results)
    save_every = results[0]["job"].get("save_every")
    where = f"a ModelCheckpoint every {save_every} steps, on a disk," if save_every else "`in_memory_checkpoint=1`"
    stands_by = "has imported nothing, as ranks that start" if results[0]["job"].get("imports") else "has all imported"
    disk = "a disk that all nodes share" if save_every else "no checkpoint on a disk"
    moments = "\n".join(_moment(moment, outcomes) for moment in sorted({o["death"]["moment"] for o in outcomes}))
    (out / "README.md").write_text(
        f"""# Nodes that die, and a job that goes on

**Question.** Does a job with {where} go on with the same bits when nodes, ranks or keepers die at any moment, and how
soon?

**Method.** Nodes are network namespaces joined by links on one machine, with torchrun on each and its store on a node
that does not die. The job trains with dropout, a validation that draws random numbers, accumulation of two micro-steps,
a loader with a worker, and {disk}. At an ordered moment the victim says that it has begun and waits
for SIGKILL; a dead node is replaced by one that {stands_by}. Losses are compared with those of
the same job undisturbed, as exact numbers, of all ranks and micro-steps, also where computed twice.

**Machine.** {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python {platform.python_version()}, torch
{torch.__version__}, gloo. Eight ranks share the cores, so times are long.

**Result.** {len(outcomes)} deaths: {sum(found["different_losses"] for found in results)} of
{sum(found["losses"] for found in results)} losses differ, {sum(found["different_ends"] for found in results)} of
{sum(found["job"]["nodes"] * found["job"]["ranks_per_node"] for found in results)} ranks differ at the end (weights,
optimizer states, random number generators). At most {max(0, *lost)} steps that all ranks had done were lost. Written to
disks by a rank: at most {max(found["disk_bytes"] for found in results) / 2**20:.2f} MiB, logs included. Keepers left
afterwards: {sum(found["keepers_left"] for found in results)}; files, in `/dev/shm` or for temporary files:
{sum(len(found["files_left"]) for found in results)}.

**Commit.** {commit}, {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.kill_node {" ".join(arguments)}
```

| nodes x ranks, partition size | deaths | different losses | seconds to the next step: median (most) | \
without rendezvous: median (most) | KiB more that a rank sends per step (at most) |
|---|--:|--:|--:|--:|--:|
{table}

*Without rendezvous*: from the time at which all ranks run again. Bytes are of all links, with the headers of
packets and the launchers' own, in runs of their own with and without in-memory checkpoints, between two steps after
which all ranks rest.

## By moment

| moment | deaths | seconds to the next step: median (most) |
|---|--:|--:|
{moments}

![Time from a death to the next step](recovery.svg)
"""
    )


def _row(found: dict[str, Any]) -> str:
    job, outcomes = found["job"], found["outcomes"]
    whole = [outcome["seconds"]["step"] for outcome in outcomes]
    rest = [outcome["seconds"]["step"] - outcome["seconds"]["started"] for outcome in outcomes]
    return (
        f"| {job['nodes']}x{job['ranks_per_node']}, {job['partition_size']} | {len(outcomes)} "
        f"| {found['different_losses']} of {found['losses']} | {_spread(whole)} | {_spread(rest)} "
        f"| {more_in_words(found)} |"
    )


def _moment(moment: str, outcomes: Sequence[dict[str, Any]]) -> str:
    lines = []
    for what in ("node", "rank", "keeper", "cable"):
        seconds = [
            o["seconds"]["step"] for o in outcomes if (o["death"]["moment"], o["death"]["what"]) == (moment, what)
        ]
        if seconds:
            lines.append(f"| {moment}, of a {what} | {len(seconds)} | {_spread(seconds)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"


def _draw(file: Path, outcomes: Sequence[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    start = 0.0
    for part in (part for part in PARTS if all(part in outcome["seconds"] for outcome in outcomes)):
        end = statistics.median(outcome["seconds"][part] for outcome in outcomes)
        axes.barh(0, max(0.0, end - start), left=start, label=f"{WORDS[part]}: {end:.1f} s")
        start = max(start, end)
    axes.set_yticks([])
    axes.set_xlabel("seconds after a death, medians")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.55), ncols=2, frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
