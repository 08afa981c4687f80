"""Whether everything that plans recommend fits, by rehearsals at full depth.

python -m benchmarks.auto.rehearsed --out benchmarks/results/auto/rehearsed

Each pair of a model and a cluster of ``conf/`` that has a plan is rehearsed as the plan recommends: one optimizer step
of all its blocks by one rank, without values. What that allocates is compared with the plan's memory and with what a
device leaves to tensors. A rehearsal takes up to a minute; pairs of an earlier call into the same folder stay.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import train
from benchmarks.auto.pairs import ROOT, composed, names
from lightning_mics.policy.memory import usable_bytes
from recipes.job.auto import choose_automatically
from recipes.plan.dry_run import rehearse_run
from recipes.plan.tables import places

GIB = 2**30


def rehearsed(model: str, cluster: str) -> dict[str, Any]:
    """Rehearse what the plan of a pair recommends; returns a row, or why there is no plan.

    Args:
        model: Name of the model.
        cluster: Name of the cluster.
    """
    config = composed(model, cluster)
    module, begin, pair = train.make_model(config), time.perf_counter(), {"model": model, "cluster": cluster}
    try:
        job = choose_automatically(config, module)
    except ValueError as error:
        return pair | {"no_plan": str(error)}
    assert job.planned is not None
    chosen = job.planned.recommended
    return pair | {
        "partition_size": chosen.topology.partition_size,
        "places": places(chosen),
        "micro_batch": chosen.batches.micro,
        "micro_steps": chosen.batches.accumulation,
        "recommended_fits": chosen.fits,
        "planned_bytes": chosen.memory_bytes,
        "rehearsed_bytes": rehearse_run(job, module).peak_bytes,
        "usable_bytes": usable_bytes(job.planned.capacity_bytes),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def summarized(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the range of planned over rehearsed memory, of rows that have a plan which fits."""
    fitting = [row for row in rows if row.get("recommended_fits")]
    ratios = [row["planned_bytes"] / row["rehearsed_bytes"] for row in fitting]
    return {
        "pairs": len(rows),
        "fit_by_plan": len(fitting),
        "fit_when_rehearsed": sum(row["rehearsed_bytes"] <= row["usable_bytes"] for row in fitting),
        "least": min(ratios),
        "largest": max(ratios),
    }


def write_page(out: Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    """Write ``results.json`` and ``README.md``.

    Args:
        out: Folder of both.
        rows: Rows of :func:`rehearsed`.
        command: Command line that made them.
    """
    commit = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    summary = summarized(rows)
    out.mkdir(parents=True, exist_ok=True)
    listed = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"commit": commit.stdout.strip(), "summary": summary}, indent=1).removesuffix("\n}")
    (out / "results.json").write_text(f'{head},\n "rows": [\n{listed}\n ]\n}}\n')
    lines = [
        f"| {row['model']} | {row['cluster']} | {row['partition_size']} | {row['places']} "
        f"| {row['micro_batch']} x {row['micro_steps']} | {row['planned_bytes'] / GIB:.4g} "
        f"| {row['rehearsed_bytes'] / GIB:.4g} | {row['usable_bytes'] / GIB:.4g} |"
        for row in rows
        if row.get("recommended_fits")
    ]
    (out / "README.md").write_text(f"""# Whether what plans recommend fits, rehearsed at full depth

**Question.** Does everything that "auto" recommends fit a device when the program itself is run?

**Method.** One optimizer step of all blocks by one rank, without values, for each pair of `conf/model` and
`conf/cluster` at the network's own rate. *Computed and rehearsed, not measured on a GPU*: what CUDA, NCCL and the
allocator take is a reserve apart, which "usable" leaves out.

**Result.** Of {summary["pairs"]} pairs {summary["fit_by_plan"]} fit by their plan, and
{summary["fit_when_rehearsed"]} of these when rehearsed. Plans say {summary["least"]:.4f} to {summary["largest"]:.4f}
times what is allocated. Pairs that have no plan, or none that fits, are in results.json.

```bash
{command}
```

Pairs can be made in several calls, by `--models` and `--clusters`; those of earlier calls stay. The last was at
commit {commit.stdout.strip()}.

| model | cluster | ranks | cached, accumulated | micro-batch x steps | planned, GiB | rehearsed, GiB | usable, GiB |
|---|---|--:|---|--:|--:|--:|--:|
{chr(10).join(lines)}
""")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse and write the page; the exit status is 1 if something that should fit does not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto.rehearsed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=names("model"), choices=names("model"))
    parser.add_argument("--clusters", nargs="+", default=names("cluster"), choices=names("cluster"))
    parser.add_argument("--jobs", type=int, default=2, help="processes; the rows are the same")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    page = options.out / "results.json"
    before = json.loads(page.read_text())["rows"] if page.exists() else []
    rows = {(row["model"], row["cluster"]): row for row in before}
    with ProcessPoolExecutor(options.jobs) as pool:
        running = {pool.submit(rehearsed, *pair) for pair in product(options.models, options.clusters)}
        for ended in as_completed(running):
            row = ended.result()
            rows[row["model"], row["cluster"]] = row
            print(*row.values(), flush=True)
            if any(each.get("recommended_fits") for each in rows.values()):
                write_page(
                    options.out,
                    [rows[key] for key in sorted(rows)],
                    f"python -m benchmarks.auto.rehearsed --out {shlex.quote(str(options.out))}",
                )
    summary = summarized(list(rows.values()))
    return int(summary["fit_when_rehearsed"] < summary["fit_by_plan"])


if __name__ == "__main__":
    raise SystemExit(main())
