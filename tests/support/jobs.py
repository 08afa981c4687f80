"""Jobs to rehearse: models, shapes and options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import train
from lightning_mics import CommunicationOptions
from lightning_mics.planning import Workload, measure_workload
from lightning_mics.planning.rehearsal.rehearse import Rehearsal, rehearse
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.topology import Topology
from recipes.plan.dry_run import Training
from tests.support.configs import composed

MODELS = {"gpt": "gpt-tiny", "bert": "bert-tiny"}


SEQUENCES, LENGTH = 2, 48


ADAPTED = " with adapters"  # after the name of a model


@dataclass(frozen=True)
class Job:
    """What is rehearsed, and run.

    Attributes:
        shape: Ranks, ranks per node, partition size.
        communication: How collectives run.
        precision: Precision by Lightning's name.
        reduce_dtype: Dtype in which gradients are reduced; None follows the precision.
        activation_checkpointing: Whether blocks are recomputed in backward.
        offload: Which model states are in host memory.
    """

    shape: tuple[int, int, int]
    communication: CommunicationOptions = CommunicationOptions.PAPER
    precision: str = "32-true"
    reduce_dtype: torch.dtype | None = None
    activation_checkpointing: bool = False
    offload: Offload = False

    @property
    def topology(self) -> Topology:
        world_size, ranks_per_node, partition_size = self.shape
        return Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size)


NODE, RANK = CommunicationOptions.NODE, CommunicationOptions.RANK


JOBS = {
    "one rank a group": Job((4, 2, 1)),
    "a node a group": Job((4, 2, 2)),
    "without two hops": Job((4, 2, 2), CommunicationOptions(two_hop=False)),
    "a node a group, once per step": Job((4, 2, 2), RANK),
    "flat over nodes": Job((4, 2, 4), CommunicationOptions(hierarchical=False)),
    "hierarchical": Job((4, 2, 4)),
    "hierarchical, fetched ahead": Job((4, 2, 4), CommunicationOptions(inter_node_prefetch=1)),
    "parameters once per step": Job((4, 2, 4), CommunicationOptions(cache_parameters="node")),
    "flat, parameters once per step": Job((4, 2, 4), CommunicationOptions(hierarchical=False, cache_parameters="node")),
    "gradients once per step": Job((4, 2, 4), CommunicationOptions(accumulate_gradients="node")),
    "once per step": Job((4, 2, 4), NODE),
    "once per step everywhere": Job((4, 2, 4), RANK),
    "once per step, on the host": Job((4, 2, 4), replace(NODE, cache_offload=True)),
    "parameters once per step, on the host": Job(
        (4, 2, 4), CommunicationOptions(cache_parameters="node", cache_offload=True)
    ),
    "mixed precision, on the host": Job((4, 2, 4), replace(NODE, cache_offload=True), precision="bf16-mixed"),
    "replicas over nodes, on the host": Job((8, 2, 4), replace(NODE, cache_offload=True)),
    "half of the blocks, on the host": Job(
        (4, 2, 4), CommunicationOptions(cache_parameters=0.5, accumulate_gradients=0.5, cache_offload=True)
    ),
    "a rank a node": Job((4, 1, 4), NODE),
    "half of the bytes between nodes": Job((4, 2, 4), replace(NODE, inter_node_reduce_dtype=torch.bfloat16)),
    "replicas over nodes": Job((8, 2, 4), NODE),
    "replicas, half of the bytes": Job((8, 2, 4), CommunicationOptions(inter_node_reduce_dtype=torch.bfloat16)),
    "recomputed": Job((4, 2, 2), activation_checkpointing=True),
    "mixed precision": Job((4, 2, 4), NODE, precision="bf16-mixed"),
    "half precision": Job((4, 2, 2), precision="bf16-true", reduce_dtype=torch.float32),
}


def language_model(name: str, layers: int = 2) -> Any:
    return train.make_model(_config(name, layers))


@cache
def _config(name: str, layers: int) -> Any:
    model, adapters = MODELS[name.removesuffix(ADAPTED)], []
    if name.endswith(ADAPTED):
        adapters = ["+model.adapters={r: 4, target_modules: all-linear}"]
        layers = max(layers, 6)  # so that a share of the blocks can be on ranks
    of_depth = f"model.network.num_hidden_layers={layers}"
    return composed(f"model={model}", of_depth, f"data.sequence_length={LENGTH}", *adapters)


def loss(model: nn.Module, batch: Any) -> Tensor:
    value: Tensor = model(batch)
    return value


def measured(name: str, job: Job, **options: Any) -> Workload:
    """The work of a model, with the options of a job."""
    model = language_model(name)
    return measure_workload(
        lambda: Training(model),
        model.example_batch(SEQUENCES, LENGTH),
        samples=SEQUENCES,
        loss=loss,
        precision=job.precision,
        reduce_dtype=job.reduce_dtype,
        activation_checkpointing=job.activation_checkpointing,
        offload=job.offload,
        **options,
    )


def rehearsed(name: str, job: Job, *, layers: int = 2, **options: Any) -> Rehearsal:
    model = language_model(name, layers)
    return rehearse(
        lambda: Training(model),
        model.example_batch(SEQUENCES, LENGTH),
        loss=loss,
        topology=job.topology,
        communication=job.communication,
        precision=job.precision,
        reduce_dtype=job.reduce_dtype,
        activation_checkpointing=job.activation_checkpointing,
        offload=job.offload,
        **{"backend": "gloo", "gradient_clip_val": 1.0, "micro_steps": 3, **options},
    )


@cache
def rehearsed_job(name: str, job: str, rank: int = 0) -> Rehearsal:
    """One of the jobs above; rehearsed once for all who ask."""
    return rehearsed(name, JOBS[job], rank=rank)
