"""Speed of one rank: a GPT of a billion parameters against a plain loop and plain FSDP2, and the host's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import host_time
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import BILLION, GPT, SMALL, Size
from benchmarks.gpu.picture import draw, events_of
from benchmarks.gpu.ranks import alone, synchronize
from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics.sharding.activation_checkpointing import recompute_in_backward
from lightning_mics.sharding.shard_model import mixed_precision_policy

TURNS, STEPS, WARM_UP = 6, 5, 4
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250}  # dense bfloat16, by name of the device
MFU, RATIO = 0.5, 0.98  # targets


def run(findings: Findings) -> None:
    """Run the part."""
    with findings.attempt("speed of training"), alone(findings.device):
        _training(findings)
    with findings.attempt("host time"):
        host_time.measure(findings)


def _training(findings: Findings) -> None:
    device, on_gpu = findings.device, findings.device == "cuda"
    size = BILLION if on_gpu else SMALL
    steps = {"plain PyTorch": _plain(size, device), "plain FSDP2": _fsdp2(size, device), "MiCS": _mics(size, device)}
    for step in steps.values():
        for _ in range(WARM_UP if on_gpu else 1):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(TURNS if on_gpu else 1):
        for name in names if turn % 2 == 0 else names[::-1]:
            seconds[name].append(_seconds(steps[name], device))
    tokens = size.batch * size.sequence
    for name in names:
        findings.add(f"{name}, 1B GPT: tokens/s", round(tokens / statistics.median(seconds[name])))
    target = on_gpu or None
    if on_gpu:
        peak, source = _peak_tflops()
        mfu = size.flops_of_step / statistics.median(seconds["MiCS"]) / 1e12 / peak
        findings.add(f"MFU of {peak:.0f} TFLOPS ({source})", f"{mfu:.3f}", target=f"at least {MFU}", holds=mfu >= MFU)
    for other in names[:2]:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[other], seconds["MiCS"], strict=True))
        findings.add(
            f"speed of MiCS over {other}, of the same turn", f"{ratio:.3f}",
            target=f"at least {RATIO}" if target else "", holds=ratio >= RATIO if target else None,
        )  # fmt: skip
    if on_gpu:
        with findings.attempt("trace"):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                steps["MiCS"]()
                synchronize(device)
            count = draw(events_of(profiler), findings.out / "step.svg", title="One step of MiCS, 1B GPT, one rank")
            findings.add("picture of a step, step.svg: rectangles", count)


def _seconds(step: Callable[[], None], device: str) -> float:
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize(device)
    return (time.perf_counter() - begun) / STEPS


def _model(size: Size, device: str) -> Any:
    """With compiled blocks: hooks of FSDP2 run around what is compiled, and recomputation too."""
    torch.manual_seed(0)
    model = GPT(size).to(device)
    if device == "cuda":
        for block in model.blocks:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return model


def _stepping(model: Any, size: Size, device: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randint(size.vocabulary, (size.batch, size.sequence), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _plain(size: Size, device: str) -> Callable[[], None]:
    model = _model(size, device)
    recompute_in_backward(model.blocks)
    return _stepping(model, size, device)


def _fsdp2(size: Size, device: str) -> Callable[[], None]:
    model = _model(size, device)
    recompute_in_backward(model.blocks)
    mesh = init_device_mesh(device, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _stepping(model, size, device)


def _mics(size: Size, device: str) -> Callable[[], None]:
    model = _model(size, device)
    groups = create_partition_groups(Topology(world_size=1, ranks_per_node=1, partition_size=1), device_type=device)
    shard_model(model, groups, mixed_precision=mixed_precision_policy("bf16-mixed"), activation_checkpointing=True)
    return _stepping(model, size, device)


def _peak_tflops() -> tuple[float, str]:
    """Peak of the device in bfloat16: its data sheet's, or that of a large product of matrices."""
    name = torch.cuda.get_device_name(0)
    known = next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)
    if known is not None:
        return float(known), "data sheet"
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - begun) / 1e12, "product of matrices, measured"
