"""Lightning's own way to FSDP2: ``ModelParallelStrategy``, with ``fully_shard`` by hand in ``configure_model``.

``@node`` takes the strategy's second axis, meant for tensor parallelism, as the one to shard over: hybrid sharding, the
least traffic between nodes that it offers. ``@world`` shards over all ranks. Either way it reduces gradients, and over
replicas too, in every micro-step.
"""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy

from benchmarks.comparison.job import Job
from benchmarks.comparison.lightning_loop import ComparedModule, train_in_trainer
from benchmarks.comparison.systems import fsdp2, partition_nodes

PACKAGES: tuple[str, ...] = ("lightning",)


class ShardedByHand(ComparedModule):
    """Shards its model over the strategy's mesh."""

    def configure_model(self) -> None:
        """Called by the Trainer once the mesh is there."""
        mesh = self.device_mesh
        assert mesh is not None  # ModelParallelStrategy has set it
        fsdp2.shard(self.model, mesh["data_parallel"] if mesh["tensor_parallel"].size() == 1 else mesh)


def train(setting: str | None, job: Job) -> None:
    """Train under Lightning's Trainer."""
    assert setting is not None  # every system of this module has one
    partition_size = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
    replicas = job.world_size // partition_size
    sizes = (replicas, partition_size) if replicas > 1 else (job.world_size, 1)
    strategy = ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    job.notes.append(
        f"data_parallel_size={sizes[0]}, tensor_parallel_size={sizes[1]}; FSDP2 over {partition_size} ranks"
    )
    train_in_trainer(job, ShardedByHand(job), strategy=strategy)
