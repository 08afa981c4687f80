"""The groups of a job on a few ranks: every kind of group, every hop, and all options as in the job.

A job on 64 nodes of 8 GPUs with partition groups of 16 ranks has rails of two nodes, node groups of 8, and 32 replicas.
On two nodes of two ranks a partition group of all four has a rail of two and a node group of two; on four nodes there
are replicas as well. What the sizes are does not matter to what is communicated after what; which kinds there are does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mics.topology import Topology

LIFTED = ("reduce_dtype", "inter_node_reduce_dtype")  # dtypes that are coarser than the sums that are compared


@dataclass(frozen=True)
class ScaledJob:
    """A job with the groups of another one, on fewer ranks.

    Attributes:
        name: Name in the report.
        topology: Positions of the ranks.
        options: Options of the strategy.
        lifted: Options that were set to None, with their values in the job.
    """

    name: str
    topology: Topology
    options: Mapping[str, Any]
    lifted: Mapping[str, Any]

    def __str__(self) -> str:
        positions = self.topology
        shown = {name: value for name, value in self.options.items() if name not in ("ranks_per_node", *self.lifted)}
        listed = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"{positions.nodes} nodes of {positions.ranks_per_node}: {listed}"


def scaled_jobs(
    options: Mapping[str, Any], *, job_shape: tuple[int, int] | None, shape: tuple[int, int] | None
) -> list[ScaledJob]:
    """The job on a few ranks, and the paper's plain schedule beside it as a control.

    Args:
        options: Options of the strategy; see :class:`~lightning_mics.policy.options.PolicyOptions`.
        job_shape: Nodes and ranks per node of the job; None if unknown: nodes of 8 ranks, as many as replicas need.
        shape: Nodes and ranks per node to run on; None takes as many as the job's kinds of groups need.

    Raises:
        ValueError: If the options do not fit the job, or its kinds of groups do not fit ``shape``.
    """
    size = options.get("partition_size", "auto")
    if size == "auto":
        across = _job("the job, over all nodes", options, shape or (2, 2), size="all")
        inside = _job("the job, inside nodes", options, shape or (2, 2), size="node")
        return [across, inside]
    nodes, per_node = job_shape or _smallest(size, options.get("ranks_per_node") or 8)
    try:
        of_job = Topology(world_size=nodes * per_node, ranks_per_node=per_node, partition_size=size)
    except ValueError as error:
        raise ValueError(
            f"{error}; the job is taken to be {nodes} nodes of {per_node}, unless job_shape says"
        ) from None
    scaled = _scaled(of_job, shape)
    own = _job("the job", options, (scaled.nodes, scaled.ranks_per_node), size=scaled.partition_size)
    plain = {name: options[name] for name in ("block_classes", "broadcast_buffers", "allow_unused") if name in options}
    plain |= {"cache_parameters": "never", "accumulate_gradients": "shard"}
    fits = shape is None and scaled.world_size % 4 == 0  # a window of the job must divide among the control's ranks
    control_shape = (2, 2) if fits else (scaled.nodes, scaled.ranks_per_node)
    control = _job("the plain schedule", plain, control_shape, size="node")
    return [own, control]


def _smallest(size: int, per_node: int) -> tuple[int, int]:
    """Nodes and ranks per node of the smallest job with replicas of this size."""
    return (2 * max(1, size // per_node), per_node)


def _scaled(job: Topology, shape: tuple[int, int] | None) -> Topology:
    spans, local = job.spans_nodes, job.local_ranks_per_partition_group
    whole_nodes = local == job.ranks_per_node
    if shape is None:
        per_node = (1 if local == 1 else 2) if whole_nodes else (4 if local > 1 else 2)
        over = job.nodes // job.nodes_per_partition_group  # nodes, or groups of nodes, with replicas
        nodes = 2 * min(over, 2) if spans else min(over, 3 if per_node <= 2 else 2)
        shape = (nodes, per_node)
    nodes, per_node = shape
    if spans:
        size = per_node * (2 if nodes >= 4 and job.replicas > 1 and nodes % 2 == 0 else nodes)
    else:
        size = per_node if whole_nodes else max(1, per_node // 2 if local > 1 else 1)
    if spans and nodes == 1:
        raise ValueError(f"shape={shape} has one node, and partition groups of the job span several: use (2, 2)")
    return Topology(world_size=nodes * per_node, ranks_per_node=per_node, partition_size=size)


def _job(name: str, options: Mapping[str, Any], shape: tuple[int, int], *, size: int | str) -> ScaledJob:
    nodes, per_node = shape
    sizes = {"all": nodes * per_node, "node": per_node}
    topology = Topology(
        world_size=nodes * per_node,
        ranks_per_node=per_node,
        partition_size=sizes[size] if isinstance(size, str) else size,
    )
    lifted = {option: options[option] for option in LIFTED if options.get(option) is not None}
    scaled = {
        **options,
        **dict.fromkeys(lifted),
        "partition_size": topology.partition_size,
        "ranks_per_node": per_node,
    }
    for option, otherwise in (("cache_parameters", "rank"), ("accumulate_gradients", "rank")):
        chosen = scaled.get(option, "auto")
        if chosen == "auto":  # what is largest in memory, and most different from sharding at every use
            scaled[option] = "node" if topology.spans_nodes else otherwise
        elif isinstance(chosen, float) and chosen < 1:
            scaled[option] = 0.5  # of two blocks, one
    share = scaled.get("frozen_on_ranks", 0.0)
    if share == "auto" or 0 < share < 1:
        scaled["frozen_on_ranks"] = 0.5  # of two blocks, one, if something is frozen
    if not scaled.get("two_hop", True):
        scaled["accumulate_gradients"] = "shard"
    return ScaledJob(name, topology, scaled, lifted)
