"""Memory of a plan against a rehearsal: every model of ``conf/model`` on one cluster, at three micro-batches.

python -m benchmarks.step_memory --blocks 8 --out benchmarks/results/step_memory

The closed form of the plan is compared with the allocations of the program itself, run as one rank without values. A
rehearsal of a large model takes up to a minute. Blocks are alike, and the closed form measures networks of four and six
of them, so ``--blocks 8`` already counts what is extrapolated. What ``--minutes`` leave out is said, and rows of an
earlier call into the same folder stay: the table can be made model by model.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import train
from benchmarks.auto.pairs import ROOT, composed
from lightning_mics.policy.step_memory import step_bytes
from recipes.job.auto import choose_automatically
from recipes.plan.dry_run import rehearse_run
from recipes.plan.tables import place_label

GIB = 2**30


CLUSTERS = {
    "bert-10b": "p3dn_16",
    "bert-15b": "p3dn_16",
    "bert-20b": "p3dn_16",
    "bert-50b": "p3dn_16",
    "bert-base": "p4d_2",
    "bert-large": "p4d_2",
    "bert-tiny": "p4d_2",
    "gpt-1.5b": "p3dn_8",
    "gpt-10b": "p4d_8",
    "gpt-20b": "p4d_16",
    "gpt-100b": "p4d_64",
    "gpt-175b": "p4de_16",
    "gpt-tiny": "p4d_2",
    "gpt2": "p4d_2",
    "llama-8b": "p5_8",
    "llama-70b": "p5_64",
    "roberta-20b": "p3dn_16",
}


def compared(model: str, cluster: str, *overrides: str, rehearsals: int = 3) -> Iterator[dict[str, Any]]:
    """Compare the way that the plan recommends at a quarter of its micro-batch, twice and four times that.

    Args:
        model: Name of the model.
        cluster: Name of the cluster.
        overrides: Further values of the configuration.
        rehearsals: Number of micro-batches.

    Yields:
        A row with the bytes of both.
    """
    config = composed(model, cluster, *overrides)
    module = train.make_model(config)
    job = choose_automatically(config, module)
    chosen = job.config
    micro, total = chosen.data.batch_size, chosen.data.batch_size * chosen.trainer.accumulate_grad_batches
    smallest = max(1, micro // 4)
    for count in sorted({smallest, 2 * smallest, 4 * smallest})[:rehearsals]:
        own = copy.deepcopy(chosen)
        own.data.batch_size, own.trainer.accumulate_grad_batches = count, max(1, total // count)
        topology, options = job.sharding.topology, job.sharding.communication
        begin = time.perf_counter()
        yield {
            "model": model,
            "cluster": cluster,
            "blocks": module.config.num_hidden_layers,
            "partition_size": topology.partition_size,
            "cache_parameters": options.cache_parameters,
            "accumulate_gradients": options.accumulate_gradients,
            "micro_batch": count,
            "micro_steps": own.trainer.accumulate_grad_batches,
            "closed_bytes": step_bytes(
                job.workload,
                topology,
                options,
                samples=count,
                micro_steps=own.trainer.accumulate_grad_batches,
            ),
            "rehearsed_bytes": rehearse_run(replace(job, config=own), module).peak_bytes,
            "seconds": round(time.perf_counter() - begin, 1),
        }


def with_blocks(model: str, blocks: int | None) -> list[str]:
    """The override that gives a model so many blocks; none for all of its own."""
    network = composed(model, CLUSTERS[model]).model.network
    name = "n_layer" if "n_layer" in network else "num_hidden_layers"
    return [] if blocks is None else [f"model.network.{name}={blocks}"]


def ratio(row: dict[str, Any]) -> float:
    """Bytes of the closed form over those of the rehearsal."""
    return float(row["closed_bytes"] / row["rehearsed_bytes"])


def write_page(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``results.json`` and ``README.md``.

    Args:
        out: Folder of both.
        rows: Rows of :func:`compared`.
    """
    commit = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    least, largest = min(map(ratio, rows)), max(map(ratio, rows))
    summary = {"rows": len(rows), "models": len({row["model"] for row in rows}), "least": least, "largest": largest}
    out.mkdir(parents=True, exist_ok=True)
    listed = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"commit": commit.stdout.strip(), "summary": summary}, indent=1).removesuffix("\n}")
    (out / "results.json").write_text(f'{head},\n "rows": [\n{listed}\n ]\n}}\n')
    lines = [
        "# Memory of a plan against a rehearsal",
        "",
        "**Question.** How far is the closed form, by which plans decide what fits, from what a rank allocates?",
        "",
        "**Method.** Each model of `conf/model` on one cluster, as the plan recommends, at its micro-batch",
        "and at a half and a quarter of it, or at 1, 2 and 4. The closed form measures networks of four and six blocks",
        "and counts the others; the rehearsal runs one optimizer step of the blocks of the table, without values.",
        "*Computed and rehearsed, not measured on a GPU*: what CUDA, NCCL and the allocator take is a reserve apart.",
        "",
        f"**Result.** {summary['rows']} steps of {summary['models']} models: the closed form is {least:.4f} to",
        f"{largest:.4f} times the rehearsal.",
        "",
        "```bash",
        "python -m benchmarks.step_memory --blocks 8 --out benchmarks/results/step_memory",
        "```",
        "",
        f"Commit {commit.stdout.strip()}.",
        "",
        "| model | cluster | blocks | ranks | cached, accumulated | micro-batch x steps | closed form, GiB "
        "| rehearsed, GiB | ratio |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['cluster']} | {row['blocks']} | {row['partition_size']} "
            f"| {place_label(row['cache_parameters'])}, {place_label(row['accumulate_gradients'])} "
            f"| {row['micro_batch']} x {row['micro_steps']} "
            f"| {row['closed_bytes'] / GIB:.4g} | {row['rehearsed_bytes'] / GIB:.4g} | {ratio(row):.4f} |"
        )
    (out / "README.md").write_text("\n".join([*lines, ""]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and write the page; the exit status is 1 if a ratio is not within 1.00 and 1.03."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CLUSTERS), choices=list(CLUSTERS))
    parser.add_argument("--blocks", type=int, help="blocks of each model; all without it")
    parser.add_argument("--minutes", type=float, default=8.0, help="no rehearsal begins later")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    page = options.out / "results.json"
    before = json.loads(page.read_text())["rows"] if page.exists() else []
    rows = {(row["model"], row["micro_batch"]): row for row in before if row["model"] not in options.models}
    end = time.monotonic() + 60 * options.minutes
    for model in options.models:
        for row in compared(model, CLUSTERS[model], *with_blocks(model, options.blocks)):
            rows[model, row["micro_batch"]] = row
            print(
                model, f"{row['micro_batch']} x {row['micro_steps']}", f"{ratio(row):.4f}", row["seconds"], flush=True
            )
            if time.monotonic() > end:
                break
        if time.monotonic() > end:
            left = options.models[options.models.index(model) + 1 :]
            print(f"stopped in {model}; left out: {', '.join(left) or 'none'}")
            break
    ordered = sorted(rows.values(), key=lambda row: (list(CLUSTERS).index(row["model"]), row["micro_batch"]))
    write_page(options.out, ordered)
    return int(not all(1 <= ratio(row) <= 1.03 for row in ordered))


if __name__ == "__main__":
    raise SystemExit(main())
