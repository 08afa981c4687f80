"""This package without a trainer: ``lightning_mics.shard_model`` in the same loop as FSDP2.

``flat`` communicates in partition groups as a whole, ``hierarchical`` in two stages, ``once-per-step`` in two stages of
which the one between nodes runs once per optimizer step. With ``kept`` nothing runs more often: each rank keeps what it
has gathered, and its sums of gradients, to the boundary.
"""

from __future__ import annotations

from benchmarks.comparison.bare_loop import train_in_bare_loop
from benchmarks.comparison.job import Job
from benchmarks.comparison.systems import partition_nodes
from benchmarks.comparison.workload import build_model, make_optimizer
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.collectives.traffic import Traffic

PACKAGES: tuple[str, ...] = ()
COMMUNICATION = {
    "flat": CommunicationOptions(hierarchical=False),
    "hierarchical": CommunicationOptions(hierarchical=True),
    "once-per-step": CommunicationOptions.NODE,
    "kept": CommunicationOptions.RANK,
}


def train(setting: str | None, job: Job) -> None:
    """Train under MiCS; see the module's docstring for the settings."""
    assert setting is not None  # every system of this module has one
    topology = topology_of(setting, job)
    communication = COMMUNICATION[setting.partition("@")[0]]
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=communication.hierarchical)
    model = build_model(job.workload)
    schedule = shard_model(model, groups, communication=communication)
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    job.notes.append(f"{topology}, {communication}")
    job.recorder.account = lambda: sent_by_node(schedule.traffic, job)
    train_in_bare_loop(job, model, optimizer, micro_step=schedule.micro_step)


def sent_by_node(traffic: Traffic, job: Job) -> float:
    """Bytes that this rank's node has sent to other nodes, from the package's own count, which is per rank."""
    return job.ranks_per_node * sum(sent.between_bytes for sent in traffic.by_technique().values())


def topology_of(setting: str, job: Job) -> Topology:
    """The ranks of the job in the partition groups of this setting."""
    partition_size = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
    return Topology(world_size=job.world_size, ranks_per_node=job.ranks_per_node, partition_size=partition_size)
