"""What the systems of DeepSpeed share: its engine on CPUs with gloo, their settings of ZeRO, and their loop.

DeepSpeed's limits count elements and are made for billions of them: with the defaults, this workload's parameters would
all stay gathered, and nothing of ZeRO-3 would be left. Here they are cut to the workload's size.
"""

from __future__ import annotations

import logging
import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses its accelerator while it is imported

import deepspeed
import deepspeed.ops
from deepspeed.utils import logger
from torch import nn

from benchmarks.comparison.job import Job
from benchmarks.comparison.plan import Phase
from benchmarks.comparison.workload import build_model, make_optimizer

logger.setLevel(logging.WARNING)
# An op for inference, compiled when first wanted; its shared memory takes all ranks for those of one node
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_in_engine(job: Job, zero_settings: dict[str, Any]) -> None:
    """Train the workload in DeepSpeed's engine through all phases.

    Args:
        job: This rank's share of the run.
        zero_settings: What the system adds to the settings of ZeRO-3, or changes.
    """
    os.environ["LOCAL_SIZE"] = str(job.ranks_per_node)  # DeepSpeed's CPUs of one node; else it counts NUMA nodes
    model = build_model(job.workload)
    zero_settings = size_limits(model) | zero_settings
    optimizer = make_optimizer(job.workload, model.parameters(), name=job.plan.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_settings(job, zero_settings))
    job.notes.append(f"zero_optimization {zero_settings}")
    for index, phase in enumerate(job.plan.phases):
        job.recorder.begin_phase(index)
        # tells the engine by how much to divide losses; when to step it is told in each micro-step
        engine.set_train_batch_size(job.workload.micro_batch * phase.micro_steps * job.world_size)
        first = job.plan.first_step(index)
        for step in range(first, first + phase.all_steps):
            job.recorder.finish_step(_run_step(engine, job, phase, step))


def engine_settings(job: Job, zero_settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration for fp32 with an optimizer of torch."""
    return {
        "train_micro_batch_size_per_gpu": job.workload.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips to 1.0 unless told otherwise
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "contiguous_gradients": True, "overlap_comm": True} | zero_settings,
    }


def size_limits(model: nn.Module) -> dict[str, Any]:
    """Limits under which LayerNorms alone stay gathered, and one block is fetched while another computes."""
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    return {
        "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.dim() == 1),
        "stage3_prefetch_bucket_size": block,
        "stage3_max_reuse_distance": block,
        "stage3_max_live_parameters": 2 * block + largest,
        "reduce_bucket_size": max(block, largest),
    }


def _run_step(engine: deepspeed.DeepSpeedEngine, job: Job, phase: Phase, step: int) -> float:
    losses = []
    for micro_step in range(phase.micro_steps):
        engine.set_gradient_accumulation_boundary(micro_step == phase.micro_steps - 1)
        loss = engine(job.micro_batch(step=step, micro_step=micro_step))
        engine.backward(loss)
        engine.step()  # of the optimizer at the boundary only
        losses.append(loss.item())
    return sum(losses) / len(losses)
