"""Ranks that count as one node run on one host, or the job ends before it shards anything."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_mics.policy import hosts
from lightning_mics.policy.policy import Policy
from tests.support.models import TinyLM
from tests.support.trainers import cases_on_ranks

RANKS = 4


def shard_on(names: str, **options: Any) -> str:
    """Shard a model where each rank's host has one of ``names``; what came of it."""
    with patch.object(socket, "gethostname", lambda: names[dist.get_rank()]):
        try:
            Policy(partition_size=2, **options).shard(
                TinyLM(), precision="32-true", device=torch.device("cpu"), local_size=2
            )
        except ValueError as error:
            return str(error)
    return "sharded"


def shard_on_machines_of_one_name() -> str:
    own = f"boot {dist.get_rank() % 2}"
    with patch.object(hosts, "BOOT_ID", **{"read_text.return_value": own}):
        return shard_on("aaaa")


def shard_with_names_for_nccl() -> str:
    with patch.dict("os.environ", {"NCCL_HOSTID": f"node {dist.get_rank() // 2}"}):
        return shard_on("abab")


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return cases_on_ranks(
        {
            "one machine": partial(shard_on, "aaaa"),
            "node by node": partial(shard_on, "aabb"),
            "cyclic": partial(shard_on, "abab"),
            "cyclic, nodes given": partial(shard_on, "abab", ranks_per_node=2),
            "machines of one name": shard_on_machines_of_one_name,
            "names for NCCL": shard_with_names_for_nccl,
        },
        world_size=RANKS,
    )


@pytest.mark.parametrize("case", ["one machine", "node by node", "cyclic, nodes given", "names for NCCL"])
def test_nodes_that_share_a_host_or_were_given_are_accepted(case, found):
    assert found[case] == ["sharded"] * RANKS


def test_ranks_of_a_node_on_several_hosts_are_an_error_of_all_ranks_that_names_them(found):
    message = (
        "ranks 0 to 1 count as one node, because the launcher says that each node has 2 ranks, but they run on several "
        "hosts (rank 0 on a, rank 1 on b). Start ranks node by node (with SLURM: --distribution=block), or pass "
        "ranks_per_node=, which is not compared with hosts"
    )
    assert found["cyclic"] == [message] * RANKS


def test_machines_of_one_name_are_told_apart(found):
    assert all("they run on several hosts" in message for message in found["machines of one name"])
