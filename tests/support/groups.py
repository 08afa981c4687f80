"""Partition groups for options of communication."""

from __future__ import annotations

from lightning_mics import CommunicationOptions, PartitionGroups, Topology, create_partition_groups


def groups_for(topology: Topology, options: CommunicationOptions) -> PartitionGroups:
    """This rank's groups on CPUs, as a policy makes them for options without "auto"."""
    return create_partition_groups(
        topology, device_type="cpu", hierarchical=options.hierarchical, caches_on_nodes=options.caches_on_nodes
    )
