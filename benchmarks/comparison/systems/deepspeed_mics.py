"""DeepSpeed MiCS, the reference implementation, with its mends: partition groups of one node, two nodes or all.

Where a partition group spans nodes, its all-gather is hierarchical; the reduce-scatter of DeepSpeed never is.
"""

from __future__ import annotations

from benchmarks.comparison.deepspeed_loop import train_in_engine  # first: it chooses DeepSpeed's accelerator
from benchmarks.comparison.job import Job
from benchmarks.comparison.systems import partition_nodes
from benchmarks.comparison.systems.deepspeed_mics_mends import apply_mends

PACKAGES: tuple[str, ...] = ("deepspeed",)


def train(setting: str | None, job: Job) -> None:
    """Train under MiCS with partition groups of the setting's reach."""
    assert setting is not None  # every system of this module has one
    nodes = partition_nodes(setting, nodes=job.nodes)
    job.notes.extend(f"mended: {mend}" for mend in apply_mends())
    train_in_engine(
        job,
        {
            "mics_shard_size": nodes * job.ranks_per_node,
            "mics_hierarchical_params_gather": nodes > 1,
        },
    )
