"""The page of a ranking: regret, order and bytes of what was predicted, from what was timed."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.auto.pairs import ROOT
from benchmarks.host_time import geometric_mean_with_interval
from benchmarks.ranking.bytes import predicted_link_bytes, rehearsed_peak_bytes
from benchmarks.ranking.cells import MODEL, SAMPLES, Way
from recipes.plan.tables import place_label

APART = 1.1  # ratio from which two predictions count as different


def write_page(out: Path, launches: Sequence[dict[str, Any]], counted: Sequence[dict[str, Any]], command: str) -> None:
    """Write ``results.json`` and ``README.md``.

    Args:
        out: Folder of both.
        launches: Measurements of each shape and rate.
        counted: Ways of each shape, and the bytes that links carried.
        command: Command line that made them.
    """
    cells = [judged(launch, cell) for launch in launches for cell in launch["cells"]]
    links = [judged_link(each) for each in counted]
    commit = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    summary = {
        "cells": len(cells),
        "regret_at_most_5_percent": sum(cell["regret"] <= 0.05 for cell in cells),
        "largest_regret": max(cell["regret"] for cell in cells),
        "not_slower_than_flat": sum(cell["over_flat"][1] <= 1 and cell["over_flat"][2] < 1.05 for cell in cells),
        "least_tau": min(cell["tau"] for cell in cells),
        "fit_when_rehearsed": sum(cell["peak_bytes"] <= cell["capacity_bytes"] for cell in cells),
        "largest_error_of_bytes": max((abs(link["error"]) for link in links), default=0.0),
    }
    out.mkdir(parents=True, exist_ok=True)
    results = {"command": command, "commit": commit.stdout.strip(), "summary": summary, "cells": cells, "links": links}
    (out / "results.json").write_text(json.dumps(results | {"measured": list(launches)}, separators=(",", ":")))
    remarks = out / "remarks.md"
    (out / "README.md").write_text(_text(results, remarks.read_text() if remarks.exists() else ""))


def judged(launch: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """What the measurements say of a cell.

    Args:
        launch: Measurements of its shape and rate.
        cell: The cell.
    """
    timed = by_program(cell["timed"])
    chosen = timed[program(cell["chosen"])]
    best = min(timed.values(), key=lambda each: each["seconds"])
    same = cell["chosen"] == cell["flat"]
    ratios = [ours / flat for ours, flat in cell["pairs"]]
    return {
        "shape": launch["shape"],
        "rate": launch["rate"],
        "capacity_bytes": cell["capacity_bytes"],
        "peak_bytes": rehearsed_peak_bytes(Way(**cell["chosen"]), ranks_per_node=_ranks_per_node(launch)),
        "fitting": cell["fitting"],
        "timed": len(timed),
        "chosen": cell["chosen"],
        "flat": cell["flat"],
        "best": best["way"],
        "predicted": chosen["predicted"],
        "seconds": chosen["seconds"],
        "regret": chosen["seconds"] / best["seconds"] - 1,
        "over_flat": [1.0, 1.0, 1.0] if same else geometric_mean_with_interval(ratios),
        "tau": kendall_tau([(each["predicted"], each["seconds"]) for each in timed.values()]),
    }


def program(way: dict[str, Any]) -> Way:
    """What runs under a way: gradients of one micro-step are summed nowhere, so it does not matter where."""
    found = Way(**way)
    return replace(found, accumulate_gradients="shard") if found.micro_batch == SAMPLES else found


def by_program(timed: Sequence[dict[str, Any]]) -> dict[Way, dict[str, Any]]:
    """Median seconds of each program that was timed, over all ways that run it.

    Args:
        timed: Ways, with their predicted seconds and the seconds of each step.
    """
    found: dict[Way, dict[str, Any]] = {}
    for each in timed:
        one = found.setdefault(program(each["way"]), {**each, "seconds": []})
        one["seconds"] = one["seconds"] + each["seconds"]
    return {each: {**one, "seconds": median(one["seconds"])} for each, one in found.items()}


def kendall_tau(timed: Sequence[tuple[float, float]]) -> float:
    """Kendall's rank correlation of predictions and measurements, over pairs whose predictions are 10 % apart.

    Args:
        timed: Predicted and measured seconds of each way.
    """
    apart = [
        math.copysign(1, (one[0] - other[0]) * (one[1] - other[1]))
        for one, other in itertools.combinations(timed, 2)
        if max(one[0], other[0]) > APART * min(one[0], other[0])
    ]
    return sum(apart) / len(apart) if apart else 1.0


def judged_link(counted: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a way beside what is predicted for it.

    Args:
        counted: Shape, way and bytes on the link of a node.
    """
    predicted = predicted_link_bytes(Way(**counted["way"]), ranks_per_node=_ranks_per_node(counted))
    error = counted["bytes"] / predicted - 1 if predicted else 0.0
    return counted | {"predicted": predicted, "error": error}


def _ranks_per_node(launch: dict[str, Any]) -> int:
    return int(launch["shape"].split("x")[1])


def label(way: dict[str, Any]) -> str:
    """A way in a few words."""
    stages = "in stages" if way["hierarchical"] else "flat"
    places = f"{place_label(way['cache_parameters'])}, {place_label(way['accumulate_gradients'])}"
    return f"{way['partition_size']} {stages}, {way['micro_batch']} samples, {places}"


def _is_in_part(way: dict[str, Any]) -> bool:
    return isinstance(way["cache_parameters"], float) or isinstance(way["accumulate_gradients"], float)


def _text(results: dict[str, Any], remarks: str) -> str:
    found = results["summary"]
    cells = [
        f"| {cell['shape']} | {cell['rate']} | {cell['capacity_bytes'] / 1e6:.1f} | {cell['peak_bytes'] / 1e6:.1f} "
        f"| {cell['fitting']} "
        f"| {label(cell['chosen'])} | {cell['predicted']:.2f} | {cell['seconds']:.2f} | {cell['regret']:.0%} "
        f"| {cell['over_flat'][0]:.2f} ({cell['over_flat'][1]:.2f} to {cell['over_flat'][2]:.2f}) "
        f"| {cell['tau']:.2f} |"
        for cell in results["cells"]
    ]
    links = [
        f"| {link['shape']} | {label(link['way'])} | {link['predicted'] / 1e6:.2f} | {link['bytes'] / 1e6:.2f} "
        f"| {link['error']:+.2%} |"
        for link in results["links"]
        if _is_in_part(link["way"])
    ]
    return f"""# Whether "auto" chooses well, measured on the emulated cluster

**Question.** Among all ways to run a job that fit the memory, does the planner take the fastest, and is it ever slower
than flat full sharding?

**Method.** Nodes are network namespaces joined by links with a rate, all on one machine; eight ranks, real TCP between
nodes, gloo. A model of {MODEL.layers} blocks of width {MODEL.width}, 16 samples for each rank and optimizer step, in
micro-batches of 1, 4 or 16. Each shape and rate is calibrated in the same launch: collectives in two sizes, and a
micro-step without communication for each micro-batch. A pretended memory decides what fits, by the closed form of
plans. The planner then searches partition size, stages, caches, sums and micro-batch. Timed are its choice, flat full
sharding with its largest micro-batch, what is predicted to be within 1.5 times the best, and some slower ways, in
turns, one model at a time, after a whole step that is not; ways that differ only in where gradients of one micro-step
are summed are one program.
*Regret* is the choice's time over the least time of these, less 1. The ratio to flat full sharding is a geometric mean
of paired turns with its 95 % interval. Kendall's tau is over pairs whose predictions are 10 % apart.
Bytes are counted by links that are not shaped, so that nothing is sent twice, without the headers of packets.

**Result.** {found["cells"]} cells. The regret is at most 5 % in {found["regret_at_most_5_percent"]}, and
{found["largest_regret"]:.0%} at most. The choice is not slower than flat full sharding in
{found["not_slower_than_flat"]}, and takes no more than the pretended memory, as rehearsed, in
{found["fit_when_rehearsed"]}. The least tau is {found["least_tau"]:.2f}. What the links carried in
{len(results["links"])} ways is within {found["largest_error_of_bytes"]:.2%} of the predicted bytes.

```bash
{results["command"]}
```

Shapes and rates can be run one by one, by `--shapes` and `--rates`; what is measured again replaces what was there.
Commit {results["commit"]}.

| shape | links | memory, MB | taken, MB | ways fit | chosen | predicted, s | measured, s | regret | over flat | tau |
|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|
{chr(10).join(cells)}

Bytes that a node sends in an optimizer step where only some of the blocks are cached or summed on nodes, in MB:

| shape | way | predicted | on the link | error |
|---|---|--:|--:|--:|
{chr(10).join(links)}

{remarks}"""
