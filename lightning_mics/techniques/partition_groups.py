"""Technique 1: partition groups. From a topology to process groups and the device mesh.

MiCS, section 3.1. FSDP2 is given a mesh of ``(replicas, partition_size)``: it shards over the second axis, so that the
constant traffic of sharded training stays inside a partition group, and replicates over the first::

                     "shard" axis ->
    "replicate"   0 2 1 3    partition group 0, rail by rail
     axis         4 6 5 7    partition group 1

Where collectives are flat a partition group is listed in the order of ranks: a ring in that order enters each node
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics._torch.process_groups import (
    backends_of_devices,
    backends_with_host,
    groups_made,
    new_group,
)
from lightning_mics.collectives.control_plane import ControlPlane, control_plane
from lightning_mics.topology import Topology


@dataclass(frozen=True, kw_only=True)
class PartitionGroups:
    """The process groups of this rank and the mesh that FSDP2 shards over.

    Attributes:
        topology: Positions of all ranks.
        partition: Ranks that hold one replica, rail by rail; in ascending order where collectives are flat.
        replication: Ranks that hold the same shard as this rank; None if there is one replica.
        rail: Ranks of the partition group with this local rank, one per node; None where the partition group is inside
            one node or collectives are flat.
        node: Ranks of the partition group on this node, where it spans nodes of several each and collectives run in two
            stages or parameters are cached on nodes; else None.
        mesh: ``("replicate", "shard")`` of shape ``(replicas, partition_size)``; with one replica ``("shard",)``.
        backend: Name of the backend that runs the collectives of all of these groups: ``"gloo"`` or ``"nccl"``.
        control: Control plane of all ranks, where they agree on what they communicate.
    """

    topology: Topology
    partition: dist.ProcessGroup
    replication: dist.ProcessGroup | None
    rail: dist.ProcessGroup | None
    node: dist.ProcessGroup | None
    mesh: DeviceMesh
    backend: str
    control: ControlPlane

    @property
    def in_stages(self) -> bool:
        """Whether there are the groups of both stages of collectives."""
        return self.rail is not None and self.node is not None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        if self.mesh.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.mesh.device_type, torch.get_device_module(self.mesh.device_type).current_device())


def create_partition_groups(
    topology: Topology,
    *,
    device_type: str,
    hierarchical: bool | Literal["auto"] = "auto",
    timeout: timedelta | None = None,
    rail_max_ctas: int | None = None,
    caches_on_nodes: bool = False,
    serve_host: bool = False,
) -> PartitionGroups:
    """Make this rank's groups and mesh; every rank calls it, after ``init_process_group``.

    Each rank makes its own groups only, all ranks in the same order of kinds, so start-up does not grow with the number
    of groups. With NCCL each takes memory on the device from its first collective on, or at once where
    ``init_process_group`` was given a ``device_id``, so what serves nothing is not made. In two stages the partition
    group still serves what the mesh does: norms of gradients, and parameters that are used directly or gathered whole.

    Args:
        topology: Positions of all ranks of the default process group.
        device_type: ``"cpu"`` or ``"cuda"``.
        hierarchical: Whether collectives of the partition group run in two stages; see :func:`choose_hierarchical`.
        timeout: Longest time of a collective of these groups; None is the backend's default.
        rail_max_ctas: Largest number of blocks of threads of a collective along rails, on NCCL; None is NCCL's default.
        caches_on_nodes: Whether parameters are cached on nodes, which takes groups inside nodes where collectives are
            flat, too.
        serve_host: Whether the axes of the mesh also serve tensors in host memory, by gloo: for shards that are there.

    Raises:
        RuntimeError: If ``torch.distributed`` is not initialized, or ranks are members of different numbers of process
            groups.
        ValueError: If the topology is not that of the running job, the backend cannot serve the device,
            ``hierarchical`` does not fit the topology, or ``rail_max_ctas`` is given and the backend is not NCCL.
    """
    in_stages = choose_hierarchical(hierarchical, topology)
    backend = _check_job(topology, device_type)
    _check_max_ctas(rail_max_ctas, backend)
    control = control_plane(timeout)
    check_same_count_of_groups(control)
    rank, make = dist.get_rank(), partial(new_group, timeout=timeout)
    of_mesh = partial(make, backend=backends_with_host() if serve_host else None)
    one_stage_over_rails = topology.spans_nodes and topology.local_ranks_per_partition_group == 1
    partition = of_mesh(
        _members(topology, rank, in_stages), name="partition", max_ctas=rail_max_ctas if one_stage_over_rails else None
    )
    replication = of_mesh(topology.replication_group(rank), name="replication") if topology.replicas > 1 else None
    rail, node = None, None
    if one_stage_over_rails:
        rail = partition
    elif in_stages:
        rail = make(topology.rail(rank), name="rail", max_ctas=rail_max_ctas)
    if not one_stage_over_rails and (in_stages or (caches_on_nodes and topology.spans_nodes)):
        node = make(topology.node_group(rank), name="node")
    return PartitionGroups(
        topology=topology,
        partition=partition,
        replication=replication,
        rail=rail,
        node=node,
        mesh=_mesh(topology, in_stages, device_type, partition, replication),
        backend=backend,
        control=control,
    )


def choose_hierarchical(hierarchical: bool | Literal["auto"], topology: Topology) -> bool:
    """Whether collectives of the partition group run in two stages; "auto": where it spans nodes of two ranks or more.

    Args:
        hierarchical: The user's option: ``"auto"``, True or False.
        topology: Positions of all ranks.

    Raises:
        ValueError: If the value is unknown, or True where a partition group is inside one node.
    """
    if hierarchical == "auto":
        return topology.spans_nodes and topology.local_ranks_per_partition_group > 1
    check_hierarchical(hierarchical)
    if hierarchical and not topology.spans_nodes:
        raise ValueError(
            f"hierarchical=True needs partition groups over several nodes, but partition_size="
            f"{topology.partition_size} fits one node of {topology.ranks_per_node} ranks; use hierarchical='auto'"
        )
    return hierarchical


def check_hierarchical(hierarchical: object) -> None:
    """Check that the option is "auto", True or False.

    Raises:
        ValueError: If it is not.
    """
    if hierarchical != "auto" and not isinstance(hierarchical, bool):
        raise ValueError(f'hierarchical={hierarchical!r} is not one of "auto", True, False')


def _check_max_ctas(rail_max_ctas: int | None, backend: str) -> None:
    if rail_max_ctas is None:
        return
    if isinstance(rail_max_ctas, bool) or not isinstance(rail_max_ctas, int) or rail_max_ctas < 1:
        raise ValueError(f"rail_max_ctas={rail_max_ctas!r} is neither None nor a positive integer")
    if backend != "nccl":
        raise ValueError(
            f"rail_max_ctas={rail_max_ctas} is an option of NCCL, and this job runs on {backend}; leave it out"
        )


def _members(topology: Topology, rank: int, in_stages: bool) -> tuple[int, ...]:
    ranks = topology.partition_group(rank)
    return ranks if in_stages else tuple(sorted(ranks))


def _mesh(
    topology: Topology,
    in_stages: bool,
    device_type: str,
    partition: dist.ProcessGroup,
    replication: dist.ProcessGroup | None,
) -> DeviceMesh:
    if replication is None:  # FSDP2 would all-reduce gradients over a second axis of one rank, too
        return DeviceMesh.from_group(partition, device_type, mesh_dim_names=("shard",))
    first_ranks = range(0, topology.world_size, topology.partition_size)
    ranks = [_members(topology, first, in_stages) for first in first_ranks]  # [replicas, partition_size]
    return DeviceMesh.from_group(
        [replication, partition], device_type, mesh=torch.tensor(ranks), mesh_dim_names=("replicate", "shard")
    )


def _check_job(topology: Topology, device_type: str) -> str:
    """Check that the running job fits the topology; return the backend that serves ``device_type``."""
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group before create_partition_groups")
    if dist.get_world_size() != topology.world_size:
        raise ValueError(
            f"the topology has world_size={topology.world_size}, the running job has {dist.get_world_size()} ranks"
        )
    backends = backends_of_devices()
    if device_type not in backends:
        raise ValueError(
            f"the process group's backend ({dist.get_backend_config()}) cannot serve device type {device_type!r}; "
            "use gloo for CPU and nccl for CUDA"
        )
    return backends[device_type]


def check_same_count_of_groups(control: ControlPlane) -> None:
    """Check that ranks can make groups: torch names one after the count of earlier ones; every rank calls it.

    Args:
        control: Control plane of all ranks.

    Raises:
        RuntimeError: If ranks are members of different numbers of groups, so that they would wait forever.
    """
    own = groups_made()
    most, fewest = control.largest(torch.tensor([own, -own]), "compares the numbers of its groups").abs().tolist()
    if fewest != most:
        raise RuntimeError(
            f"some ranks are members of {most} process groups and others of {fewest}; make groups of your own after "
            "the model is sharded, or make every rank a member of the same number of them"
        )
