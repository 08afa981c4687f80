"""This package without a trainer: ``lightning_mics.shard_model`` in the same loop as FSDP2.

``flat`` communicates in partition groups as a whole, ``hierarchical`` in two stages, ``once-per-step`` in two stages of
which the one between nodes runs once per optimizer step. With ``kept`` nothing runs more often: each rank keeps what it
has gathered, and its sums of gradients, to the boundary.
"""

from __future__ import annotations

from typing import Any, Literal

from benchmarks.comparison.bare_loop import train_in_bare_loop
from benchmarks.comparison.job import Job
from benchmarks.comparison.systems import partition_nodes
from benchmarks.comparison.workload import build_model, make_optimizer
from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics.collectives.traffic import Traffic

PACKAGES: tuple[str, ...] = ()
EVERY_TIME = {"cross_node_gather": "every_use", "cross_node_reduce": "every_micro_step"}
ONCE = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}
KEPT = {"in_node_gather": "once_per_step", "in_node_reduce": "once_per_step"}


def train(setting: str | None, job: Job) -> None:
    """Train under MiCS; see the module's docstring for the settings."""
    assert setting is not None  # every system of this module has one
    topology = topology_of(setting, job)
    hierarchical, options = schedule_options(setting)
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=hierarchical)
    model = build_model(job.workload)
    schedule = shard_model(model, groups, **options)
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    job.notes.append(f"{topology}, hierarchical={hierarchical}, {options}")
    job.recorder.account = lambda: sent_by_node(schedule.traffic, job)
    train_in_bare_loop(job, model, optimizer, micro_step=schedule.micro_step)


def sent_by_node(traffic: Traffic, job: Job) -> float:
    """Bytes that this rank's node has sent to other nodes, from the package's own count, which is per rank."""
    return job.ranks_per_node * sum(sent.between_bytes for sent in traffic.by_technique().values())


def topology_of(setting: str, job: Job) -> Topology:
    """The ranks of the job in the partition groups of this setting."""
    partition_size = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
    return Topology(world_size=job.world_size, ranks_per_node=job.ranks_per_node, partition_size=partition_size)


def schedule_options(setting: str) -> tuple[bool | Literal["auto"], dict[str, Any]]:
    """Whether collectives run in two stages, and the options that say how often they run."""
    kind = setting.partition("@")[0]
    settings: dict[str, tuple[bool | Literal["auto"], dict[str, Any]]] = {
        "flat": (False, EVERY_TIME),
        "hierarchical": (True, EVERY_TIME),
        "once-per-step": (True, ONCE),
        "kept": ("auto", KEPT),
    }
    return settings[kind]
