"""Memory: one rank of a job of 8 and of 512 on the real device, with a fake process group, against its rehearsal."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import GPT, SMALL, Size
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch.fake import rehearsed_job
from lightning_mics.planning import rehearse
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.sharding.shard_model import mixed_precision_policy

LARGE = Size(layers=18, width=2048, vocabulary=50304, sequence=2048, batch=2)
TARGET = 0.05
Job = tuple[Topology, CommunicationOptions, Offload]
EIGHT = Topology(world_size=8, ranks_per_node=8, partition_size=8)
JOBS: dict[str, Job] = {
    "one of 8 ranks": (EIGHT, CommunicationOptions.PAPER, False),
    "one of 512 ranks, two stages": (
        Topology(world_size=512, ranks_per_node=8, partition_size=64), CommunicationOptions.PAPER, False,
    ),
    "one of 512 ranks, node cache and sums": (
        Topology(world_size=512, ranks_per_node=8, partition_size=64), CommunicationOptions.NODE, False,
    ),
    "one of 512 ranks, node cache and sums, cache_offload=True": (
        Topology(world_size=512, ranks_per_node=8, partition_size=64),
        replace(CommunicationOptions.NODE, cache_offload=True), False,
    ),
    "one of 512 ranks, rank cache and sums": (
        Topology(world_size=512, ranks_per_node=8, partition_size=64), CommunicationOptions.RANK, False,
    ),
    'one of 8 ranks, offload="optimizer"': (EIGHT, CommunicationOptions.PAPER, "optimizer"),
    "one of 8 ranks, offload=True": (EIGHT, CommunicationOptions.PAPER, True),
}  # fmt: skip


def run(findings: Findings) -> None:
    """Run the part."""
    on_gpu = findings.device == "cuda"
    size = LARGE if on_gpu else SMALL
    for name, job in JOBS.items() if on_gpu else [list(JOBS.items())[index] for index in (2, 3, 6)]:
        with findings.attempt(name):
            planned = _rehearsed(size, job)
            findings.add(f"{name}: rehearsed peak, GiB", round(planned / 2**30, 4))
            if not on_gpu:
                seen = _train(size, job, findings.device)
                findings.add(f"{name}: most memory allocated on CPUs, which do not count it", seen["allocated"])
                continue
            torch.cuda.set_device(0)
            left_over = torch.cuda.memory_allocated()
            findings.add(f"{name}: allocated before, MiB", round(left_over / 2**20, 1))
            seen = _train(size, job, findings.device)
            for figure in ("allocated", "reserved"):
                ratio = seen[figure] / planned
                findings.add(
                    f"{name}: most memory {figure}, of the rehearsed", f"{ratio:.3f}",
                    target=f"within {TARGET:.0%}", holds=abs(ratio - 1) <= TARGET,
                )  # fmt: skip
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 1.05 * seen["reserved"] / total))
            try:
                retries = _train(size, job, findings.device)["retries"]
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            findings.add(
                f"{name}: num_alloc_retries after step 2, with 5 % more memory than reserved", retries, target="0",
                holds=retries == 0,
            )  # fmt: skip


def _loss(model: Any, batch: Any) -> Any:
    return model(batch)


def _rehearsed(size: Size, job: Job) -> int:
    topology, communication, offload = job
    batch = torch.zeros(size.batch, size.sequence, dtype=torch.int64)
    return rehearse(
        lambda: GPT(size), batch, loss=_loss, topology=topology, micro_steps=3, precision="bf16-mixed",
        communication=communication, activation_checkpointing=True, offload=offload,
    ).peak_bytes  # fmt: skip


def _train(size: Size, job: Job, device: str) -> dict[str, int]:
    """Five steps of three micro-steps; figures of the last three. Values mean nothing: other ranks do not exist."""
    topology, communication, offload = job
    on_gpu = device == "cuda"
    figures = {"allocated": 0, "reserved": 0, "retries": 0}
    with rehearsed_job(world_size=topology.world_size, rank=0):
        groups = create_partition_groups(
            topology, device_type=device, hierarchical=communication.hierarchical, serve_host=bool(offload)
        )
        torch.manual_seed(0)
        with torch.device("meta"):
            model: Any = GPT(size)
        schedule = shard_model(
            model, groups, communication=communication, activation_checkpointing=True, offload=offload,
            mixed_precision=mixed_precision_policy("bf16-mixed"),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = torch.zeros(size.batch, size.sequence, dtype=torch.int64, device=device)
        before = 0
        for step in range(5):
            if on_gpu and step == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_stats()["num_alloc_retries"]
            for micro_step in range(3):
                with schedule.micro_step(boundary=micro_step == 2):
                    with torch.autocast(device, torch.bfloat16):
                        loss = model(batch)
                    if micro_step == 0:
                        optimizer.zero_grad()
                    loss.backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
            figures = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "retries": torch.cuda.memory_stats()["num_alloc_retries"] - before,
            }
        del model, schedule, optimizer, loss, groups
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return figures
