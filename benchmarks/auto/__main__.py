"""The command line of :mod:`benchmarks.auto`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import benchmarks.auto
from benchmarks.auto import equal_rates, jobs
from benchmarks.auto.page import write_page
from benchmarks.auto.pairs import names, planned_pairs, ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan all pairs and write the page; the exit status is 1 if one of them is slower than full sharding."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto",
        description=benchmarks.auto.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=names("model"))
    parser.add_argument("--clusters", nargs="+", default=names("cluster"))
    parser.add_argument("--override", nargs="+", default=[], help="of the configuration, as of train.py")
    parser.add_argument("--jobs", type=int, default=2, help="processes; the rows are the same")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    everything = options.models == names("model") and options.clusters == names("cluster")
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        complete = everything and not options.override
        rates = [pool.submit(_rates_of, job) for job in (equal_rates.JOBS if complete else ())]
        planned = [pool.submit(_planned_job, job) for job in (jobs.JOBS if complete else ())]
        plan = partial(_rows_of, clusters=options.clusters, overrides=options.override)
        for of_model in pool.map(plan, options.models):
            for row in of_model:
                rows.append(row)
                print(*list(row.values())[:3], row.get("no_plan") or f"{ratio(row, 'baseline'):.3f}", flush=True)
    typed = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.auto {shlex.join(typed)}"
    of_jobs, of_rates = ([row for found in each for row in found.result()] for each in (planned, rates))
    write_page(options.out, rows, command, jobs=of_jobs, rates=of_rates)
    fitting = [row for row in rows if "recommended" in row and row["baseline"]["fits"]]
    return int(any(ratio(row, "baseline") < 1 for row in fitting))


def _rows_of(model: str, *, clusters: Sequence[str], overrides: Sequence[str]) -> list[dict[str, Any]]:
    return list(planned_pairs([model], clusters, overrides))


def _rates_of(job: tuple[str, str, Sequence[str]]) -> list[dict[str, Any]]:
    return list(equal_rates.equal_rates([job]))


def _planned_job(job: tuple[str, str, Sequence[float], Sequence[str]]) -> list[dict[str, Any]]:
    return list(jobs.planned_jobs([job]))


if __name__ == "__main__":
    raise SystemExit(main())
