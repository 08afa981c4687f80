"""Jobs to rehearse: models, shapes and options."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import train
from lightning_mics.planning.rehearsal.rehearse import Rehearsal, rehearse
from lightning_mics.topology import Topology
from recipes.plan.dry_run import Training
from tests.support.configs import composed

MODELS = {"gpt": "gpt-tiny", "bert": "bert-tiny"}


SEQUENCES, LENGTH = 2, 48


ONCE = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}


NOWHERE_MORE = ONCE | {"in_node_gather": "once_per_step", "in_node_reduce": "once_per_step"}


JOBS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # (ranks, ranks per node, partition size), options
    "one rank a group": ((4, 2, 1), {}),
    "a node a group": ((4, 2, 2), {}),
    "without two hops": ((4, 2, 2), {"two_hop": False}),
    "a node a group, once per step": (
        (4, 2, 2),
        {"in_node_gather": "once_per_step", "in_node_reduce": "once_per_step"},
    ),
    "flat over nodes": ((4, 2, 4), {"hierarchical": False}),
    "hierarchical": ((4, 2, 4), {}),
    "parameters once per step": ((4, 2, 4), {"cross_node_gather": "once_per_step"}),
    "gradients once per step": ((4, 2, 4), {"cross_node_reduce": "once_per_step"}),
    "once per step": ((4, 2, 4), ONCE),
    "once per step everywhere": ((4, 2, 4), NOWHERE_MORE),
    "a rank a node": ((4, 1, 4), ONCE),
    "half of the bytes between nodes": ((4, 2, 4), {**ONCE, "inter_node_reduce_dtype": torch.bfloat16}),
    "replicas over nodes": ((8, 2, 4), ONCE),
    "replicas, half of the bytes": ((8, 2, 4), {"inter_node_reduce_dtype": torch.bfloat16}),
    "recomputed": ((4, 2, 2), {"activation_checkpointing": True}),
    "mixed precision": ((4, 2, 4), {**ONCE, "precision": "bf16-mixed"}),
    "half precision": ((4, 2, 2), {"precision": "bf16-true", "reduce_dtype": torch.float32}),
}


def language_model(name: str) -> Any:
    return train.make_model(_config(name))


@cache
def _config(name: str) -> Any:
    layers = "model.network.num_hidden_layers=2"
    return composed(f"model={MODELS[name]}", layers, f"data.sequence_length={LENGTH}")


def loss(model: nn.Module, batch: Any) -> Tensor:
    value: Tensor = model(batch)
    return value


def rehearsed(name: str, shape: tuple[int, int, int], options: dict[str, Any], **job: Any) -> Rehearsal:
    model = language_model(name)
    world_size, ranks_per_node, partition_size = shape
    return rehearse(
        lambda: Training(model),
        model.example_batch(SEQUENCES, LENGTH),
        loss=loss,
        topology=Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size),
        **{"backend": "gloo", "gradient_clip_val": 1.0, "micro_steps": 3, **options, **job},
    )


@cache
def rehearsed_job(name: str, job: str, rank: int = 0) -> Rehearsal:
    """One of the jobs above; rehearsed once for all who ask."""
    shape, options = JOBS[job]
    return rehearsed(name, shape, options, rank=rank)
