"""Where ranks run on several hosts a policy measures their links, and all ranks shard in the same way."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_mics.cost.hardware import Links
from lightning_mics.policy import policy
from lightning_mics.policy.policy import Policy
from tests.support.models import TinyLM
from tests.support.trainers import cases_on_ranks

RANKS = 4
ALL = {"partition_size": 4, "hierarchical": True, "cache_parameters": "never", "accumulate_gradients": "shard"}


def slow_on_rank_0(*_: Any, **__: Any) -> Links:
    """Links as no ranks should measure them: each rank would choose something else."""
    return Links(
        gpus_per_node=2,
        in_node_rate_gbytes_per_s=100,
        network_rate_gbits_per_s=1e-3 if dist.get_rank() == 0 else 1e6,
        network_achieved=1,
        network_latency_us=1e-3 if dist.get_rank() == 0 else 1e9,
    )


def shard(
    hosts: str = "aabb", measure: Callable[..., Links] | None = None, *, training: bool = True, **options: Any
) -> dict[str, Any]:
    """Shard a model where each rank's host has one of the names ``hosts``; what came of it."""
    probe = patch.object(policy, "measure_links", side_effect=measure or policy.measure_links)
    with patch.object(socket, "gethostname", lambda: hosts[dist.get_rank()]), probe as measured:
        sharded = Policy(**options).shard(
            TinyLM(), precision="32-true", device=torch.device("cpu"), local_size=2, training=training
        )
    return {
        "probes": measured.call_count,
        "chosen": sharded.chosen,
        "by time": "links, measured" in sharded.report,
        "report": sharded.report,
        "pinned": sharded.report.partition("to pin this")[2].partition("\n")[0].strip(),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    return cases_on_ranks(
        {
            "two hosts": shard,
            "nodes given": partial(shard, "abab", ranks_per_node=1),
            "one decides": partial(shard, measure=slow_on_rank_0),
            "one host": partial(shard, "aaaa"),
            "pretended nodes": partial(shard, "aaaa", ranks_per_node=1),
            "all given": partial(shard, **ALL),
            "evaluation": partial(shard, training=False),
        },
        world_size=RANKS,
    )


@pytest.mark.parametrize("case", ["two hosts", "nodes given", "one decides"])
def test_ranks_on_several_hosts_measure_links_and_choose_the_same_by_time(case: str, found: Any) -> None:
    assert [each["probes"] for each in found[case]] == [1] * RANKS
    assert all(each["report"] == found[case][0]["report"] and each["by time"] for each in found[case])
    assert found[case][0]["chosen"].keys() == ALL.keys()
    options = eval(f"dict({found[case][0]['pinned']})")
    assert options == found[case][0]["chosen"]


@pytest.mark.parametrize("case", ["one host", "pretended nodes", "all given", "evaluation"])
def test_nothing_is_measured_where_it_would_serve_nothing(case: str, found: Any) -> None:
    assert [(each["probes"], each["by time"]) for each in found[case]] == [(0, False)] * RANKS
    assert found[case][0]["chosen"].keys() == (set() if case == "all given" else ALL.keys())
