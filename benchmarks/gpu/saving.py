"""Saving: for how long a state of 10 GB stops training, saved at once, asynchronously, and by DCP's async_save."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import Residual
from benchmarks.gpu.ranks import alone, synchronize, torchrun_of_one
from lightning_mics import MiCSFabricStrategy

GIGABYTES, WIDTH, STATES = 10.0, 4096, 3  # a weight, and AdamW's two moments
SAVES, SECONDS = 3, 110  # of each system: most saves, and seconds after which no other begins


class _Stack(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [batch, width] -> []
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.square().mean()


def run(findings: Findings) -> None:
    """Run the part."""
    torchrun_of_one()
    on_gpu = findings.device == "cuda"
    width = WIDTH if on_gpu else 32
    layers = max(2, round(GIGABYTES * 1e9 / (4 * width**2 * 4 * STATES))) if on_gpu else 2
    medians: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=findings.out) as folder, alone(findings.device):
        for name in ("async save", "save", "DCP's async_save"):
            with findings.attempt(name):
                stalls, steps = _measure(name, width, layers, findings, Path(folder))
                medians[name] = statistics.median(stalls[1:] or stalls)
                findings.add(f"{name}: stall of the first, s", round(stalls[0], 3))
                findings.add(f"{name}: stall of later ones, s", round(medians[name], 3))
                findings.add(f"{name}: longest step beside writing, s", round(max(steps), 3))
                _record_pinned(findings, name)
            gc.collect()  # models are in cycles
        if on_gpu and {"async save", "DCP's async_save"} <= medians.keys():
            ratio = medians["async save"] / medians["DCP's async_save"]
            findings.add("stall of our async save, of DCP's", f"{ratio:.3f}", target="at most 1.0", holds=ratio <= 1.0)


def _measure(name: str, width: int, layers: int, findings: Findings, folder: Path) -> tuple[list[float], list[float]]:
    device = findings.device
    strategy = MiCSFabricStrategy(async_save=name == "async save")
    fabric = Fabric(accelerator="gpu" if device == "cuda" else "cpu", devices=1, strategy=strategy)
    fabric.launch()
    with fabric.init_module(empty_init=False):
        plain = _Stack(width, layers)
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4))
    batch = torch.randn(64, width, device=fabric.device)

    def step() -> float:
        synchronize(device)
        begun = time.perf_counter()
        fabric.backward(model(batch))
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - begun

    step()
    state = sum(p.numel() * 4 * STATES for p in plain.parameters())
    findings.add(f"{name}: state, GB", round(state / 1e9, 2))
    save, wait = _saver(name, fabric, strategy, model, optimizer)
    stalls, steps, began = [], [], time.monotonic()
    for number in range(SAVES if device == "cuda" else 1):
        if number and time.monotonic() - began > SECONDS:
            break
        path = folder / f"{name.split()[0]}-{number}"
        synchronize(device)
        begun = time.perf_counter()
        save(path)
        stalls.append(time.perf_counter() - begun)
        steps += [step(), step()]
        wait()
        if path.is_dir():
            shutil.rmtree(path)
    return stalls, steps


def _saver(
    name: str, fabric: Any, strategy: Any, model: Any, optimizer: Any
) -> tuple[Callable[[Path], None], Callable[[], None]]:
    """A function that saves and one that waits until it is written."""
    if not name.startswith("DCP"):
        return lambda path: fabric.save(path, {"model": model, "optimizer": optimizer}), strategy.wait_for_checkpoints
    group, written = dist.new_group(backend="gloo"), []

    def save(path: Path) -> None:
        inner, own = model._forward_module, optimizer.optimizer
        model_state, optimizer_state = get_state_dict(inner, own)
        state = {"model": model_state, "optimizer": optimizer_state}
        response: Any = dcp.async_save(state, checkpoint_id=str(path), process_group=group)
        written.append(getattr(response, "upload_completion", response))

    return save, lambda: written.pop().result()


def _record_pinned(findings: Findings, name: str) -> None:
    stats = getattr(torch.cuda, "host_memory_stats", None)
    if findings.device == "cuda" and stats is not None:
        peak = stats().get("allocated_bytes.peak")
        findings.add(f"{name}: most pinned memory so far, GB", "unknown" if peak is None else round(peak / 1e9, 2))
