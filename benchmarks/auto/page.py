"""The page of what "auto" gains: a table of all pairs, a picture of equal rates, and ``results.json``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.auto.equal_rates import draw
from benchmarks.auto.pairs import ROOT, label, ratio
from recipes.plan.tables import place_label

PICTURE = "equal-rates.svg"
TABLE = (
    "| model | cluster | Gbit/s | FSDP2, s | auto, s | FSDP2 / auto | tuned / auto | by the other formula "
    "| with the host: FSDP2 / auto | tuned / auto | auto takes | bytes between nodes, of FSDP2's |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|"
)


def write_page(
    out: Path,
    rows: Sequence[dict[str, Any]],
    command: str,
    *,
    jobs: Sequence[dict[str, Any]] = (),
    rates: Sequence[dict[str, Any]] = (),
) -> None:
    """Write ``results.json``, the picture and ``README.md``.

    Args:
        out: Folder of them.
        rows: Rows of :func:`~benchmarks.auto.pairs.planned_pairs`.
        command: Command line that makes the page.
        jobs: Rows of :func:`~benchmarks.auto.jobs.planned_jobs`; none leaves their table out.
        rates: Rows of :func:`~benchmarks.auto.equal_rates.equal_rates`; none leaves the picture out.
    """
    compared = [row for row in rows if "recommended" in row and row["baseline"]["fits"]]
    alone = [row for row in rows if "recommended" in row and not row["baseline"]["fits"] and row["recommended"]["fits"]]
    impossible = sorted(
        {(row["model"], row["cluster"]) for row in rows}
        - {(row["model"], row["cluster"]) for row in (*compared, *alone)}
    )
    commit = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = {
        "command": command,
        "commit": commit.stdout.strip(),
        "summary": summary(compared),
        "jobs": list(jobs),
        "equal_rates": list(rates),
        "rows": list(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(_lines(results))
    if rates:
        draw(rates, out / PICTURE)
    sections = [
        _opening(results),
        *([_jobs(jobs)] if jobs else []),
        *([_equal_rates(rates)] if rates else []),
        "\n".join(["## All pairs", "", TABLE, *map(_cells, compared)]),
    ]
    if alone:
        listed = [f"- {row['model']} on {row['cluster']}: {way(row['recommended'])}" for row in alone]
        sections.append("\n".join(["Full sharding does not fit, `auto` does:", "", *listed]))
    sections.append("No plan fits: " + "; ".join(f"{model} on {cluster}" for model, cluster in impossible) + ".")
    (out / "README.md").write_text("\n\n".join(sections) + "\n")


def summary(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the smallest ratios of all pairs in which FSDP2 fits."""
    shares = [row["recommended"]["between_bytes"] / max(1, row["baseline"]["between_bytes"]) for row in compared]
    return {
        "pairs": len(compared),
        "gain_of_a_tenth": sum(ratio(row, "baseline") >= 1.1 for row in compared),
        "least_ratio": min(ratio(row, "baseline") for row in compared),
        "least_ratio_tuned": min(ratio(row, "baseline_tuned") for row in compared),
        "least_ratio_all_hidden": min(ratio(row, "baseline", "least") for row in compared),
        "least_ratio_nothing_hidden": min(ratio(row, "baseline", "most") for row in compared),
        "least_ratio_other_formula": min(row["order_free"]["over_baseline"] for row in compared),
        "least_ratio_other_formula_tuned": min(row["order_free"]["over_tuned"] for row in compared),
        "least_ratio_on_host": min(row["on_host"]["over_baseline"] for row in compared),
        "least_ratio_on_host_tuned": min(row["on_host"]["over_tuned"] for row in compared),
        "largest_share_of_bytes": max(shares),
        "at_most_three_quarters_of_bytes": sum(share <= 0.75 for share in shares),
    }


def _opening(results: dict[str, Any]) -> str:
    found = results["summary"]
    return f"""# What "auto" gains over full sharding, as planned

**Question.** Is what the plan recommends ever slower than FSDP2 over all ranks, and where is it faster?

**Method.** Every model of `conf/model` on every cluster of `conf/cluster` with its own global batch, at the
cluster's network rate and at slower ones. FSDP2 has the same freedom of micro-batch and the same recomputation;
*tuned* is the best of its `reshard_after_forward` (True, the ranks of a node, False) and of reducing gradients once
per step, and of whatever the overrides of the command leave free. *The other formula* has no order of units: it
chooses and compares by the longer and the sum of arithmetic and communication. *With the host*, inputs of recomputed
blocks may wait in host memory, for FSDP2 tuned as well; in the first two tables caches and sums may, too. *Predicted,
not measured*; gains below 10 % are within the error of the predictions.

**Result.** {found["pairs"]} plans, of which {found["gain_of_a_tenth"]} gain at least 10 %. The smallest ratio to FSDP2
is {found["least_ratio"]:.3f}, to FSDP2 tuned {found["least_ratio_tuned"]:.3f}; with all communication hidden that can
be {found["least_ratio_all_hidden"]:.3f}, with none hidden {found["least_ratio_nothing_hidden"]:.3f}. By the other
formula they are {found["least_ratio_other_formula"]:.3f} and {found["least_ratio_other_formula_tuned"]:.3f}, with the
host {found["least_ratio_on_host"]:.3f} and {found["least_ratio_on_host_tuned"]:.3f}. Bytes between nodes are at most
{found["largest_share_of_bytes"]:.1%} of FSDP2's, in {found["at_most_three_quarters_of_bytes"]} plans at most 75 %.

```bash
{results["command"]}
```

Commit {results["commit"]}."""


def _jobs(jobs: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"| {label(job)} | {job['network_rate_gbits_per_s']:g} | {job['baseline']['seconds']['expected']:.3g} "
        f"| {ratio(job, 'baseline'):.3f} | {ratio(job, 'baseline_tuned'):.3f} | {way(job['recommended'])} "
        f"| {_ratio_on_host(job):.3f} | {way(job['on_host'])} |"
        for job in jobs
    ]
    return "\n".join(
        [
            "## Jobs of the paper, and large ones of today",
            "",
            "| job | Gbit/s | FSDP2, s | FSDP2 / auto | tuned / auto | auto takes "
            "| with the host: FSDP2 / auto | it takes |",
            "|---|--:|--:|--:|--:|---|--:|---|",
            *rows,
        ]
    )


def _ratio_on_host(job: dict[str, Any]) -> float:
    return float(job["baseline"]["seconds"]["expected"] / job["on_host"]["seconds"]["expected"])


def _equal_rates(rates: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"| {label(row)} | {row['own_mbit_per_s'] / 1000:g} | {row['mbit_per_s'] / 1000:.0f} "
        f"| {row['on_host_mbit_per_s'] / 1000:.0f} |"
        for row in rates
    ]
    return "\n".join(
        [
            "## The same speed on a slower network",
            "",
            "The network at which `auto` takes as long as FSDP2 with its defaults does at the cluster's own rate, in",
            "Gbit/s per node.",
            "",
            f"![Rates of equal seconds]({PICTURE})",
            "",
            "| job | FSDP2 | auto | auto, with host memory |",
            "|---|--:|--:|--:|",
            *rows,
        ]
    )


def _cells(row: dict[str, Any]) -> str:
    took, baseline = row["recommended"], row["baseline"]
    share = took["between_bytes"] / baseline["between_bytes"] if baseline["between_bytes"] else 1.0
    cells = [
        row["model"],
        row["cluster"],
        f"{row['network_rate_gbits_per_s']:g}",
        f"{baseline['seconds']['expected']:.3g}",
        f"{took['seconds']['expected']:.3g}",
        f"{ratio(row, 'baseline'):.2f}",
        f"{ratio(row, 'baseline_tuned'):.2f}",
        f"{row['order_free']['over_baseline']:.2f}",
        f"{row['on_host']['over_baseline']:.2f}",
        f"{row['on_host']['over_tuned']:.2f}",
        way(took),
        f"{share:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def way(took: dict[str, Any]) -> str:
    """A candidate in a few words."""
    stages = "in stages" if took["in_stages"] else "flat"
    return (
        f"{took['partition_size']} {stages}, {took['micro_batch']} x {took['micro_steps']}, "
        f"{place_label(took['cache_parameters'])}, {place_label(took['accumulate_gradients'])}"
        + (", inputs on the host" if took["activation_offload"] else "")
        + (", caches on the host" if took["cache_offload"] else "")
    )


def _lines(results: dict[str, Any]) -> str:
    """JSON with a line per row of the table."""
    head = json.dumps(_rounded({name: value for name, value in results.items() if name != "rows"}), indent=1)
    rows = ",\n".join(json.dumps(_rounded(row), separators=(",", ":")) for row in results["rows"])
    return f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n{rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
