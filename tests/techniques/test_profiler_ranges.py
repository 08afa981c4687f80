"""Profilers show each collective by technique, hop and parameter group; without one nothing is named."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.collectives import counted_group
from tests.support.models import TinyLM, tokens

BF16 = {"inter_node_reduce_dtype": torch.bfloat16}
SETS: dict[str, tuple[int, dict[str, Any], set[str]]] = {  # partition size, options, ranges of a block
    "two stages": (
        4,
        {},
        {"gather along rails", "gather inside nodes", "hop 1: reduce inside nodes", "hop 1: reduce along rails"},
    ),
    "replicas": (
        2,
        {},
        {"gather in partition groups", "hop 1: reduce in partition groups", "hop 2: all-reduce over replicas"},
    ),
    "replicas, messages in bfloat16": (2, BF16, {"hop 2: all-reduce over replicas"}),
}  # fmt: skip


def ranges(partition_size: int, options: dict[str, Any]) -> tuple[set[str], int]:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=partition_size)
    model = TinyLM()
    schedule = shard_model(
        model, create_partition_groups(topology, device_type="cpu"), communication=CommunicationOptions(**options)
    )

    def step() -> None:
        with schedule.micro_step(boundary=True):
            model(tokens(2)).backward()

    made = []
    with patch.object(counted_group.CountedGroup, "_range", _counting(made)):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {event.name for event in profiler.events() if event.name.startswith("MiCS::")}, sum(made)


def _counting(made: list[bool]) -> Any:
    original = counted_group.CountedGroup._range

    def counted(self: Any, technique: str) -> Any:
        found = original(self, technique)
        made.append(isinstance(found, torch.profiler.record_function))
        return found

    return counted


def test_ranges_name_technique_hop_and_parameter_group(run_shared: Any) -> None:
    for name, (partition_size, options, expected) in SETS.items():
        for seen, made_without_profiler in run_shared(4, ranges, partition_size, options):
            assert made_without_profiler == 0
            for unit in ("blocks.0", "blocks.1", "root"):
                assert {f"MiCS::{technique} ({unit})" for technique in expected} <= seen, name
