"""The command line of :mod:`benchmarks.ranking`: a launch for each shape and rate, and then the page."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.ranking
from benchmarks.comparison.launches import Shape
from benchmarks.emulated_cluster import EmulatedCluster
from benchmarks.ranking.cells import RANKS
from benchmarks.ranking.page import write_page

MINUTES = 40  # of a launch


def launch(shape: Shape, rate: str, arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Measure one shape at one rate.

    Args:
        shape: Shape of the cluster.
        rate: Rate of its links.
        arguments: Arguments of each rank.
        scratch: Folder of the file that the first rank writes.

    Raises:
        RuntimeError: If a node fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    out = scratch / f"{shape}-{rate}.json"
    out.unlink(missing_ok=True)  # of an earlier launch
    script = (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --nnodes $NNODES --node-rank $NODE_RANK "
        f"--nproc-per-node {shape.ranks_per_node} --master-addr $MASTER_ADDR --master-port $MASTER_PORT "
        f"-m benchmarks.ranking.ranks --out {out} {shlex.join(arguments)}"
    )
    with EmulatedCluster(shape.nodes, rate=rate) as cluster:
        outcomes = cluster.start(["sh", "-c", script]).wait(timeout=60 * MINUTES)
    if not out.exists():
        raise RuntimeError(f"{shape} at {rate}: {outcomes}")
    found: dict[str, Any] = json.loads(out.read_text())
    return {"shape": str(shape), "rate": rate, **found}


def earlier(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Launches of earlier calls, by shape and rate.

    Args:
        out: Folder of the page.
    """
    file = out / "results.json"
    launches = json.loads(file.read_text())["measured"] if file.exists() else []
    return {(launch["shape"], launch["rate"]): launch for launch in launches}


def main(typed: Sequence[str] | None = None) -> int:
    """Perform all launches and write the page; launches of earlier calls into the same folder stay on it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking",
        description=benchmarks.ranking.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=["2x4", "4x2"], metavar="NODESxRANKS")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "300mbit", "1gbit"])
    parser.add_argument(
        "--places", nargs="+", type=float, default=[0.05, 0.5, 0.9], help="of the pretended memories, 0 to 1"
    )
    parser.add_argument("--turns", type=int, default=3, help="times that each way is timed")
    parser.add_argument(
        "--pairs", type=int, default=20, help="times that a choice is timed in turns with full sharding"
    )
    parser.add_argument("--out", type=Path, required=True)
    words = sys.argv[1:] if typed is None else list(typed)
    options = parser.parse_args(words)
    shapes = [Shape.parse(text) for text in options.shapes]
    for shape in shapes:
        if shape.nodes * shape.ranks_per_node != RANKS:
            parser.error(f"--shapes {shape}: the model is made for {RANKS} ranks")
    of_ranks = ["--turns", options.turns, "--pairs", options.pairs, "--places", *options.places]
    found = earlier(options.out)
    for shape, rate in itertools.product(shapes, options.rates):
        found[str(shape), rate] = launch(shape, rate, [*map(str, of_ranks)], options.out / "scratch")
        command = f"python -m benchmarks.ranking {shlex.join(words)}"
        write_page(options.out, [found[key] for key in sorted(found)], command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
