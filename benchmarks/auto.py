"""What "auto" gains over full sharding: every model of ``conf/model`` on every cluster of ``conf/cluster``, as planned.

python -m benchmarks.auto --out benchmarks/results/auto

Nothing runs: each pair is planned, at the network rate of the cluster and at slower ones. The page compares what is
recommended with FSDP2 over all ranks, with its defaults and with the best of its own options. Seconds are predictions,
whose error on published runs is in benchmarks/results/published; bytes are exact.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from lightning_mics.planning import Workload
from lightning_mics.policy.candidates import Candidate
from recipes.job.cluster_plan import hardware_of, plan_run
from recipes.job.workload import measure_run
from recipes.plan.tables import place_label

ROOT = Path(__file__).resolve().parents[1]
SLOWER_GBITS = (100, 25)
NO_PAIRS = {"local", "hf"}  # rates unknown; a model that is downloaded


def names(group: str) -> list[str]:
    """Names of the configurations of ``group``, as users type them."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem not in NO_PAIRS)


def composed(model: str, cluster: str, *overrides: str) -> DictConfig:
    """The configuration of a model on a cluster."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [f"model={model}", f"cluster={cluster}", *overrides])


def planned_pairs(
    models: Sequence[str], clusters: Sequence[str], overrides: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Plan each model on each cluster, at each rate.

    Args:
        models: Names of models.
        clusters: Names of clusters.
        overrides: Further overrides of the configuration.

    Yields:
        A row with the three candidates, or with the reason why there is no plan.
    """
    for model in models:
        measured: dict[str, Workload] = {}
        for cluster in clusters:
            config = composed(model, cluster, *overrides)
            if config.cluster.precision not in measured:
                measured[config.cluster.precision] = measure_run(config, train.make_model(config))
            hardware = hardware_of(config.cluster)
            slower = [rate for rate in SLOWER_GBITS if rate < hardware.network_rate_gbits_per_s]
            for rate in (hardware.network_rate_gbits_per_s, *slower):
                row = {"model": model, "cluster": cluster, "network_rate_gbits_per_s": rate}
                try:
                    found = plan_run(
                        config,
                        measured[config.cluster.precision],
                        replace(hardware, network_rate_gbits_per_s=rate),
                    )
                except ValueError as error:
                    yield row | {"no_plan": str(error)}
                    break
                ways = {name: getattr(found, name) for name in ("recommended", "baseline", "baseline_tuned")}
                yield row | {name: described(way) for name, way in ways.items()}


def described(candidate: Candidate) -> dict[str, Any]:
    """Options, memory, traffic and seconds of a candidate as plain data."""
    return {
        "partition_size": candidate.topology.partition_size,
        "in_stages": candidate.in_stages,
        "micro_batch": candidate.batches.micro,
        "micro_steps": candidate.batches.accumulation,
        "activation_offload": candidate.activation_offload,
        "cache_parameters": candidate.communication.cache_parameters,
        "accumulate_gradients": candidate.communication.accumulate_gradients,
        "memory_gib": candidate.memory_bytes / 2**30,
        "fits": candidate.fits,
        "between_bytes": candidate.node_sent.between_bytes,
        "seconds": {name: getattr(candidate.seconds, name) for name in ("least", "expected", "most")},
    }


def ratio(row: dict[str, Any], baseline: str, seconds: str = "expected") -> float:
    """Seconds of a baseline over those of what is recommended; above 1 "auto" is faster."""
    return row[baseline]["seconds"][seconds] / row["recommended"]["seconds"][seconds]


def write_page(out: Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    """Write ``results.json`` and ``README.md``.

    Args:
        out: Folder of both.
        rows: Rows of :func:`planned_pairs`.
        command: Command line that makes the page.
    """
    compared = [row for row in rows if "recommended" in row and row["baseline"]["fits"]]
    alone = [row for row in rows if "recommended" in row and not row["baseline"]["fits"] and row["recommended"]["fits"]]
    impossible = sorted(
        {(row["model"], row["cluster"]) for row in rows}
        - {(row["model"], row["cluster"]) for row in (*compared, *alone)}
    )
    summary = {
        "pairs": len(compared),
        "least_ratio": min(ratio(row, "baseline") for row in compared),
        "least_ratio_tuned": min(ratio(row, "baseline_tuned") for row in compared),
        "least_ratio_all_hidden": min(ratio(row, "baseline", "least") for row in compared),
        "least_ratio_nothing_hidden": min(ratio(row, "baseline", "most") for row in compared),
    }
    commit = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = {"command": command, "commit": commit.stdout.strip(), "summary": summary, "rows": list(rows)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(_lines(results))
    lines = [
        '# What "auto" gains over full sharding, as planned',
        "",
        "**Question.** Is what the plan recommends ever slower than FSDP2 over all ranks, and where is it faster?",
        "",
        "**Method.** Every model of `conf/model` on every cluster of `conf/cluster` with its own global batch, at the",
        "cluster's network rate and at slower ones. FSDP2 has the same freedom of micro-batch and the same",
        "recomputation; *tuned* is the best of its `reshard_after_forward` (True, the ranks of a node, False) and of",
        "reducing gradients once per step, and of whatever the overrides of the command leave free. *Predicted, not",
        "measured*; gains below 10 % are within the error of the predictions.",
        "",
        f"**Result.** {summary['pairs']} plans. The smallest ratio to FSDP2 is {summary['least_ratio']:.3f}, to FSDP2",
        f"tuned {summary['least_ratio_tuned']:.3f}; with all communication hidden that can be",
        f"{summary['least_ratio_all_hidden']:.3f}, with none hidden {summary['least_ratio_nothing_hidden']:.3f}.",
        "",
        "```bash",
        command,
        "```",
        "",
        f"Commit {results['commit']}.",
        "",
        "| model | cluster | Gbit/s | FSDP2, s | auto, s | FSDP2 / auto | tuned / auto | auto takes "
        "| bytes between nodes, of FSDP2's |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for row in compared:
        took, baseline = row["recommended"], row["baseline"]
        share = took["between_bytes"] / baseline["between_bytes"] if baseline["between_bytes"] else 1.0
        lines.append(
            f"| {row['model']} | {row['cluster']} | {row['network_rate_gbits_per_s']:g} "
            f"| {baseline['seconds']['expected']:.3g} | {took['seconds']['expected']:.3g} "
            f"| {ratio(row, 'baseline'):.2f} | {ratio(row, 'baseline_tuned'):.2f} | {way(took)} | {share:.0%} |"
        )
    if alone:
        lines += ["", "Full sharding does not fit, `auto` does:", ""]
        lines += [f"- {row['model']} on {row['cluster']}: {way(row['recommended'])}" for row in alone]
    lines += ["", "No plan fits: " + "; ".join(f"{model} on {cluster}" for model, cluster in impossible) + ".", ""]
    (out / "README.md").write_text("\n".join(lines))


def _lines(results: dict[str, Any]) -> str:
    """JSON with a line per row of the table."""
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(_rounded(row), separators=(",", ":")) for row in results["rows"])
    return f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n{rows}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def way(took: dict[str, Any]) -> str:
    """A candidate in a few words."""
    stages = "in stages" if took["in_stages"] else "flat"
    return (
        f"{took['partition_size']} {stages}, {took['micro_batch']} x {took['micro_steps']}, "
        f"{place_label(took['cache_parameters'])}, {place_label(took['accumulate_gradients'])}"
        + (", inputs on the host" if took["activation_offload"] else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan all pairs and write the page; the exit status is 1 if one of them is slower than full sharding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=names("model"))
    parser.add_argument("--clusters", nargs="+", default=names("cluster"))
    parser.add_argument("--override", nargs="+", default=[], help="of the configuration, as of train.py")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows = []
    for row in planned_pairs(options.models, options.clusters, options.override):
        rows.append(row)
        print(*list(row.values())[:3], row.get("no_plan") or f"{ratio(row, 'baseline'):.3f}", flush=True)
    given = f"--override {' '.join(options.override)} " if options.override else ""
    write_page(options.out, rows, f"python -m benchmarks.auto {given}--out {options.out}")
    fitting = [row for row in rows if "recommended" in row and row["baseline"]["fits"]]
    return int(any(ratio(row, "baseline") < 1 for row in fitting))


if __name__ == "__main__":
    raise SystemExit(main())
