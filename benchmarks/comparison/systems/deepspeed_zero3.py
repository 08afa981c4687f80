"""DeepSpeed ZeRO-3 over all ranks, and with ZeRO++'s secondary partition (``hpz@node``).

The secondary partition keeps a second copy of the parameters sharded over each node's ranks, from their first gather
until the optimizer step; later gathers stay inside the node. Gradients cross nodes in every micro-step as before.
"""

from __future__ import annotations

from benchmarks.comparison.deepspeed_loop import train_in_engine
from benchmarks.comparison.job import Job
from benchmarks.comparison.systems import partition_nodes

PACKAGES: tuple[str, ...] = ("deepspeed",)


def train(setting: str | None, job: Job) -> None:
    """Train under ZeRO-3, with a secondary partition if there is a setting."""
    if setting is None:
        train_in_engine(job, {})
    else:
        reach = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
        train_in_engine(job, {"zero_hpz_partition_size": reach})
