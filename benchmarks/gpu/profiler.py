"""Seen in a profiler: ranges by technique, hop and parameter group, and advice in an out-of-memory error."""

from __future__ import annotations

import re
import traceback
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import GPT, SMALL, Size, Stack
from benchmarks.gpu.picture import draw, events_of
from benchmarks.gpu.ranks import alone, synchronize, torchrun_of_one
from lightning_mics import CommunicationOptions, MiCSFabricStrategy, Topology, create_partition_groups, shard_model
from lightning_mics._torch.fake import rehearsed_job

EXPECTED = ("gather along rails", "gather inside nodes", "hop 1: reduce inside nodes", "hop 1: reduce along rails",
            "hop 2: all-reduce over replicas")  # fmt: skip


def run(findings: Findings) -> None:
    """Run the part."""
    with findings.attempt("ranges"):
        _ranges(findings)
    with findings.attempt("out of memory"):
        _out_of_memory(findings)


def _ranges(findings: Findings) -> None:
    device = findings.device
    size = Size(layers=4, width=1024, vocabulary=1024, sequence=512, batch=4) if device == "cuda" else SMALL
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with rehearsed_job(world_size=32, rank=0):
        groups = create_partition_groups(
            Topology(world_size=32, ranks_per_node=8, partition_size=16), device_type=device
        )
        model: Any = GPT(size).to(device)
        schedule = shard_model(model, groups, communication=CommunicationOptions.PAPER)
        batch = torch.zeros(size.batch, size.sequence, dtype=torch.int64, device=device)

        def step() -> None:
            with schedule.micro_step(boundary=True):
                model(batch).backward()
            synchronize(device)

        step()
        with profile(activities=activities) as profiler:
            step()
        events = events_of(profiler)
        names = {event["name"] for event in events}
        for technique in EXPECTED:
            units = sorted(re.findall(rf"MiCS::{technique} \((.*?)\)", "\n".join(sorted(names))))
            findings.add(
                f"ranges of {technique!r}", ", ".join(units), target="all blocks and the root",
                holds=len(units) == size.layers + 1,
            )  # fmt: skip
        count = draw(events, findings.out / "ranges.svg", title="One rank of 32, two stages, other ranks do not exist")
        findings.add("picture of it, ranges.svg: rectangles", count)


def _out_of_memory(findings: Findings) -> None:
    torchrun_of_one()
    with alone(findings.device):
        fabric = Fabric(
            accelerator="gpu" if findings.device == "cuda" else "cpu", devices=1, strategy=MiCSFabricStrategy()
        )
        fabric.launch()
        plain = Stack()
        plain.blocks[0].register_forward_pre_hook(lambda *_: _exhaust(findings.device))
        model = fabric.setup_module(plain)
        try:
            model(torch.randn(2, 33, device=fabric.device))
        except torch.OutOfMemoryError as error:
            text = "".join(traceback.format_exception(error))
            named = "activation_checkpointing=True" in text
            findings.add("out-of-memory error names an option", str(named), target="True", holds=named)
            return
    findings.add("out-of-memory error", "none was raised", target="one", holds=False)


def _exhaust(device: str) -> None:
    if device == "cpu":
        raise torch.OutOfMemoryError("as on a GPU")
    torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device=device)
