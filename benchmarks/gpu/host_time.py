"""Host time per block and micro-step, over a fake group of 16 and 512 ranks, against plain FSDP2 on the same mesh."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import GPT, Size
from benchmarks.gpu.ranks import synchronize
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch.fake import rehearsed_job

MICRO_STEPS, TARGET = 4, 1.10
SYSTEMS = {
    "two stages": CommunicationOptions.PAPER,
    "node cache": CommunicationOptions(cache_parameters="node"),
    "rank cache": CommunicationOptions(cache_parameters="rank"),
}


def measure(findings: Findings) -> None:
    """Measure all systems in turns, and record ratios to plain FSDP2 of the same turn."""
    on_gpu = findings.device == "cuda"
    size = Size(layers=24 if on_gpu else 2, width=64, vocabulary=64, sequence=16, batch=2)
    for world in (16, 512) if on_gpu else (16,):
        for name, communication in SYSTEMS.items():
            with findings.attempt(f"host time of {name}, {world} ranks"), rehearsed_job(world_size=world, rank=0):
                plain, ours = _fsdp2(size, world, findings.device), _mics(size, world, communication, findings.device)
                ratios, seconds = [], []
                for turn in range(12 if on_gpu else 2):
                    pair = {}
                    for which in ("plain", "ours") if turn % 2 else ("ours", "plain"):
                        pair[which] = _seconds({"plain": plain, "ours": ours}[which], findings.device)
                    if turn >= 2 or not on_gpu:
                        ratios.append(pair["ours"] / pair["plain"])
                        seconds.append(pair["ours"])
                ratio = statistics.median(ratios)
                per_block = 1e6 * statistics.median(seconds) / (size.layers * MICRO_STEPS)
                findings.add(f"host time per block and micro-step of {name}, {world} ranks, us", round(per_block, 1))
                findings.add(
                    f"host time of {name}, {world} ranks, of plain FSDP2's", f"{ratio:.3f}",
                    target=f"at most {TARGET}" if on_gpu else "", holds=ratio <= TARGET if on_gpu else None,
                )  # fmt: skip
                del plain, ours
                gc.collect()


def _seconds(window: Callable[[], None], device: str) -> float:
    """Time until the host has launched a window; the device is idle before it."""
    synchronize(device)
    begun = time.perf_counter()
    window()
    taken = time.perf_counter() - begun
    synchronize(device)
    return taken


def _batch(size: Size, device: str) -> torch.Tensor:
    return torch.zeros(size.batch, size.sequence, dtype=torch.int64, device=device)


def _fsdp2(size: Size, world: int, device: str) -> Callable[[], None]:
    mesh = init_device_mesh(device, (world,))
    model: Any = GPT(size).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = _batch(size, device)

    def window() -> None:
        for _ in range(MICRO_STEPS):
            model(batch).backward()

    return window


def _mics(size: Size, world: int, communication: CommunicationOptions, device: str) -> Callable[[], None]:
    groups = create_partition_groups(
        Topology(world_size=world, ranks_per_node=8, partition_size=world), device_type=device
    )
    model: Any = GPT(size).to(device)
    schedule = shard_model(model, groups, communication=communication)
    batch = _batch(size, device)

    def window() -> None:
        for micro_step in range(MICRO_STEPS):
            with schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                model(batch).backward()

    return window
