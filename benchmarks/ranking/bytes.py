"""Bytes that a node's link carries in an optimizer step, as plans predict them for gloo."""

from __future__ import annotations

from functools import cache

from benchmarks.ranking.cells import RANKS, SAMPLES, Way, gloo_traffic, workload
from lightning_mics.cost.step_traffic import step_traffic
from lightning_mics.topology import Topology

measured_once = cache(workload)


def predicted_link_bytes(way: Way, *, ranks_per_node: int) -> float:
    """Bytes that a node sends to others.

    Args:
        way: Way to run the job.
        ranks_per_node: Number of ranks on each node.
    """
    work = measured_once()
    traffic = gloo_traffic(
        step_traffic,
        work.units,
        Topology(world_size=RANKS, ranks_per_node=ranks_per_node, partition_size=way.partition_size),
        communication=way.communication,
        gathered_dtype=work.gathered_dtype,
        reduce_dtype=work.reduce_dtype,
    )
    return traffic.sent(SAMPLES // way.micro_batch).between_bytes * ranks_per_node
