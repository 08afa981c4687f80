"""Hugging Face Accelerate with its FSDP2 plugin, accumulating as its documentation says: ``accelerator.accumulate``.

Before the boundary, ``accumulate`` reduces nothing and each rank holds whole, unsharded gradients. ``@node`` shards
inside a node and replicates over nodes (``ParallelismConfig``), ``@world`` shards over all ranks.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import nn

from benchmarks.comparison.job import Job
from benchmarks.comparison.systems import partition_nodes
from benchmarks.comparison.workload import build_model, make_optimizer

PACKAGES: tuple[str, ...] = ("accelerate",)


def train(setting: str | None, job: Job) -> None:
    """Train under Accelerate; see the module's docstring for the settings."""
    assert setting is not None  # every system of this module has one
    partition_size = partition_nodes(setting, nodes=job.nodes) * job.ranks_per_node
    accelerator = _accelerator(replicas=job.world_size // partition_size, partition_size=partition_size)
    model = build_model(job.workload)
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    model._set_unshard_async_op(True)  # on CPUs FSDP2 waits for each all-gather otherwise
    job.notes.append(
        f"{job.world_size // partition_size} replicas of {partition_size} ranks; whole gradients until the boundary"
    )
    for index, phase in enumerate(job.plan.phases):
        job.recorder.begin_phase(index)
        accelerator.gradient_accumulation_steps = phase.micro_steps
        accelerator.step = 0  # it counts micro-steps from here
        first = job.plan.first_step(index)
        for step in range(first, first + phase.all_steps):
            losses = [
                _run_micro_step(accelerator, model, optimizer, job.micro_batch(step=step, micro_step=micro_step))
                for micro_step in range(phase.micro_steps)
            ]
            job.recorder.finish_step(sum(losses) / len(losses))


def _run_micro_step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> float:
    with accelerator.accumulate(model):
        loss = model(tokens)
        accelerator.backward(loss)
        optimizer.step()  # both do nothing before the boundary
        optimizer.zero_grad()
    return loss.item()


def _accelerator(*, replicas: int, partition_size: int) -> Accelerator:
    # Accelerate 1.15 refuses FSDP2 on CPUs although it works there: it must take the ranks for those of GPUs
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        cpu=True,
        parallelism_config=ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=partition_size),
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        ),
    )
