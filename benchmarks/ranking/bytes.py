"""Bytes of a way: what a node's link carries in an optimizer step, as plans predict it for gloo, and its memory."""

from __future__ import annotations

from functools import cache

from benchmarks.comparison.workload import build_model
from benchmarks.ranking.cells import MODEL, RANKS, SAMPLES, Way, batch_of, gloo_traffic, loss_of, workload
from lightning_mics.cost.step_traffic import step_traffic
from lightning_mics.planning import rehearse
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
        topology_of(way, ranks_per_node),
        communication=way.communication,
        gathered_dtype=work.gathered_dtype,
        reduce_dtype=work.reduce_dtype,
    )
    return traffic.sent(SAMPLES // way.micro_batch).between_bytes * ranks_per_node


@cache
def rehearsed_peak_bytes(way: Way, *, ranks_per_node: int) -> int:
    """Bytes of tensors that a rank holds at the peak of an optimizer step, by a rehearsal.

    Args:
        way: Way to run the job.
        ranks_per_node: Number of ranks on each node.
    """
    return rehearse(
        lambda: build_model(MODEL),
        batch_of(way.micro_batch, rank=0, index=0),
        loss=loss_of,
        topology=topology_of(way, ranks_per_node),
        micro_steps=SAMPLES // way.micro_batch,
        backend="gloo",
        communication=way.communication,
    ).peak_bytes


def topology_of(way: Way, ranks_per_node: int) -> Topology:
    """The topology of the job under a way.

    Args:
        way: Way to run the job.
        ranks_per_node: Number of ranks on each node.
    """
    return Topology(world_size=RANKS, ranks_per_node=ranks_per_node, partition_size=way.partition_size)
