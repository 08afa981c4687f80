"""The command line of :mod:`benchmarks.ranking`: launches for each shape and rate, and then the page."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import benchmarks.ranking
from benchmarks.comparison.launches import Shape
from benchmarks.emulated_cluster import EmulatedCluster
from benchmarks.ranking.cells import RANKS
from benchmarks.ranking.page import write_page

MINUTES = 40  # of a launch


def launch(shape: Shape, rate: str | None, arguments: Sequence[str], out: Path) -> Any:
    """Let the ranks of one shape measure at one rate; returns what the first one has written.

    Args:
        shape: Shape of the cluster.
        rate: Rate of its links; None does not limit it.
        arguments: Arguments of each rank.
        out: File that the first rank writes.

    Raises:
        RuntimeError: If a node fails.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
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
    return json.loads(out.read_text())


def count_bytes(shape: Shape, launches: Iterable[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """Count what links carry in all ways that were timed.

    A way sends the same at any rate; here no queue is full, so nothing is sent twice.

    Args:
        shape: Shape of the cluster.
        launches: What was measured; other shapes are left out.
        scratch: Folder of files for the ranks.
    """
    cells = [cell for found in launches if found["shape"] == str(shape) for cell in found["cells"]]
    ways = scratch / "ways.json"
    scratch.mkdir(parents=True, exist_ok=True)
    ways.write_text(json.dumps([each["way"] for cell in cells for each in cell["timed"]]))
    counted: list[dict[str, Any]] = launch(shape, None, ["--bytes-of", str(ways)], scratch / f"{shape}.json")
    return [{"shape": str(shape), **each} for each in counted]


def earlier(out: Path) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What earlier calls have measured: times by shape and rate, and bytes by shape.

    Args:
        out: Folder of the page.
    """
    file = out / "results.json"
    if not file.exists():
        return {}, {}
    results = json.loads(file.read_text())
    links = {shape: list(rows) for shape, rows in itertools.groupby(results["links"], key=lambda row: row["shape"])}
    return {(launch["shape"], launch["rate"]): launch for launch in results["measured"]}, links


def main(typed: Sequence[str] | None = None) -> int:
    """Measure and write the page; what earlier calls into the same folder have measured else stays on it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking",
        description=benchmarks.ranking.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=["2x4", "4x2"], metavar="NODESxRANKS")
    parser.add_argument(
        "--rates", nargs="*", default=["100mbit", "300mbit", "1gbit"], help="of links; none: count bytes only"
    )
    parser.add_argument(
        "--places", nargs="+", type=float, default=[0.1, 0.5, 0.9], help="of the pretended memories, 0 to 1"
    )
    parser.add_argument("--turns", type=int, default=3, help="times that each way is timed")
    parser.add_argument(
        "--pairs", type=int, default=20, help="times that a choice is timed in turns with full sharding"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(typed)
    shapes = [Shape.parse(text) for text in options.shapes]
    for shape in shapes:
        if shape.nodes * shape.ranks_per_node != RANKS:
            parser.error(f"--shapes {shape}: the model is made for {RANKS} ranks")
    of_ranks = ["--turns", options.turns, "--pairs", options.pairs, "--places", *options.places]
    measured, links = earlier(options.out)
    scratch, command = options.out / "scratch", f"python -m benchmarks.ranking --out {options.out}"

    def write() -> None:
        counted = itertools.chain.from_iterable(links.values())
        write_page(options.out, [measured[key] for key in sorted(measured)], list(counted), command)

    for shape, rate in itertools.product(shapes, options.rates):
        times = launch(shape, rate, [*map(str, of_ranks)], scratch / f"{shape}-{rate}.json")
        measured[str(shape), rate] = {"shape": str(shape), "rate": rate, **times}
        write()
    for shape in shapes:
        links[str(shape)] = count_bytes(shape, measured.values(), scratch)
        write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
