"""Rates and latencies of your own machines, from the output of ``nccl-tests`` (github.com/NVIDIA/nccl-tests).

Run ``all_gather_perf -b 1M -e 4G -f 2`` on one node, and on all nodes, and save the output to files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lightning_mics.cost.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the output, out of place.

    Attributes:
        size_bytes: Bytes that are gathered or reduced, over all ranks.
        seconds: Duration of the collective.
        bus_bytes_per_s: Bus bandwidth: bytes that leave each rank of a ring per second.
    """

    size_bytes: int
    seconds: float
    bus_bytes_per_s: float


def read_runs(path: Path) -> list[Run]:
    """Read the results in a file with the output of nccl-tests.

    Raises:
        ValueError: If there are none.
    """
    runs = [run for line in path.read_text().splitlines() if (run := _read_line(line)) is not None]
    if not runs:
        raise ValueError(
            f"{path} has no results of nccl-tests: lines of size, count, type, redop, root, time, algbw, busbw"
        )
    return runs


def with_measured(
    hardware: Hardware, *, in_node: Path | None = None, between_nodes: Path | None = None, nodes: int = 2
) -> Hardware:
    """Replace rates and latencies by measured ones.

    The rate is the best bus bandwidth of any size; the latency is the time per hop of the smallest size.

    Args:
        hardware: Hardware from the table, or your own.
        in_node: File with the output of a run on one node; None keeps the rate and latency.
        between_nodes: File with the output of a run on all GPUs of several nodes; None keeps the rate and latency.
        nodes: Number of nodes of that run.

    Raises:
        ValueError: If a file has no results.
    """
    if in_node is not None:
        runs = read_runs(in_node)
        hardware = replace(
            hardware,
            in_node_rate_gbytes_per_s=_best(runs) / 1e9,
            in_node_latency_us=_latency_us(runs, hops=hardware.gpus_per_node - 1),
        )
    if between_nodes is not None:
        runs = read_runs(between_nodes)
        achieved = min(1.0, _best(runs) * 8e-9 / hardware.network_rate_gbits_per_s)
        hardware = replace(
            hardware, network_achieved=achieved, network_latency_us=_latency_us(runs, hops=max(1, nodes - 1))
        )
    return hardware


def _read_line(line: str) -> Run | None:
    fields = line.split()
    if len(fields) < 8 or not fields[0].isdigit() or not fields[1].isdigit():
        return None
    try:
        seconds, bus = float(fields[5]) * 1e-6, float(fields[7]) * 1e9
    except ValueError:
        return None
    return Run(size_bytes=int(fields[0]), seconds=seconds, bus_bytes_per_s=bus)


def _best(runs: list[Run]) -> float:
    return max(run.bus_bytes_per_s for run in runs)


def _latency_us(runs: list[Run], *, hops: int) -> float:
    """Microseconds per hop of the smallest size, without the time of its bytes at the best rate."""
    smallest = min((run for run in runs if run.size_bytes), key=lambda run: run.size_bytes)
    return max(0.1, 1e6 * (smallest.seconds - smallest.size_bytes / _best(runs)) / hops)
