"""What is cached on nodes in host memory: what "auto" makes of it, what fits, and what is refused by name."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from lightning_mics import CommunicationOptions, Topology
from lightning_mics._torch.host_memory import HostMemoryError
from lightning_mics.policy import policy as policies
from lightning_mics.policy.choice import Choice, ShardingJob, choose, fitting_ways
from lightning_mics.policy.memory import measure_model
from lightning_mics.policy.places import bytes_of_share
from lightning_mics.policy.policy import Policy
from lightning_mics.policy.start_report import start_report
from lightning_mics.sharding import activation_checkpointing
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.modules import caches_on_host
from lightning_mics.sharding.modules.caches_on_host import bytes_on_host, check_caches_fit
from lightning_mics.sharding.shard_model import mixed_precision_policy
from tests.support.models import TinyLM, tokens

NODE, AUTO = CommunicationOptions.NODE, CommunicationOptions.AUTO
OVER_NODES = Topology(world_size=4, ranks_per_node=2, partition_size=4)


def lm() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(layers=3)


def chosen(communication: CommunicationOptions, partition_size: int = 4) -> Choice:
    model = lm()
    size = measure_model(model, find_blocks(model).values())
    job = ShardingJob(
        size=size, world_size=4, ranks_per_node=2, capacity_bytes=10**9, partition_size=partition_size,
        communication=communication,
    )  # fmt: skip
    return choose(job)


def test_auto_caches_and_accumulates_all_on_nodes() -> None:
    model = lm()
    size = measure_model(model, find_blocks(model).values())
    assert chosen(AUTO).communication.cache_parameters == "rank"  # as it would fit
    choice = chosen(replace(AUTO, cache_offload=True))
    options = choice.communication
    assert (options.cache_parameters, options.accumulate_gradients, options.cache_offload) == ("node", "node", True)
    assert choice.host_bytes == size.gathered_bytes // 2 + size.reduced_bytes // 2
    largest = max(size.root_bytes, size.block_bytes)
    assert choice.cached_bytes == 2 * min(2 * largest // 2, size.gathered_bytes // 2)
    assert "of the host per rank" in choice.reasons["cache_parameters"]


def test_shares_are_as_given_and_only_their_blocks_are_on_the_host() -> None:
    model = lm()
    size = measure_model(model, find_blocks(model).values())
    choice = chosen(CommunicationOptions(cache_parameters=0.67, cache_offload=True))
    assert choice.communication.cache_parameters == 0.67
    assert choice.host_bytes == bytes_of_share(0.67, size.blocks_gathered_bytes, 2) > 0
    assert choice.cached_bytes == min(choice.host_bytes, 2 * -(-size.block_bytes // 2))


def test_all_ways_to_choose_from_by_time_have_something_on_the_host() -> None:
    model = lm()
    job = ShardingJob(
        size=measure_model(model, find_blocks(model).values()), world_size=4, ranks_per_node=2, capacity_bytes=10**9,
        communication=replace(AUTO, cache_offload=True),
    )  # fmt: skip
    ways = fitting_ways(job)
    assert {way.topology.partition_size for way in ways} == {4}
    assert {way.communication.cache_parameters for way in ways} == {"node", "never"}
    assert all(way.host_bytes > 0 for way in ways)


def test_the_start_report_names_what_is_on_the_host() -> None:
    report = partial(start_report, reduce_dtype=torch.float32)
    assert re.search(r"caches and sums on the host +.* per rank \(cache_offload=True\)", report(chosen(
        replace(AUTO, cache_offload=True)
    )))  # fmt: skip
    only = CommunicationOptions(accumulate_gradients="node", cache_offload=True)
    assert "\n  sums on the host" in report(chosen(only))
    assert "on the host" not in report(chosen(NODE))


@pytest.mark.parametrize(
    ("options", "topology", "message"),
    [
        ({}, OVER_NODES, "with cache_parameters='never' and accumulate_gradients='shard' nothing is; use"),
        (
            {"cache_parameters": "rank", "accumulate_gradients": "rank"},
            OVER_NODES,
            "with cache_parameters='rank' and accumulate_gradients='rank' nothing is; use",
        ),
        ({**AUTO.keywords(), "allow_unused": True}, OVER_NODES, "with allow_unused=True, cache_parameters='rank' and"),
        (
            {"cache_parameters": "node"},
            replace(OVER_NODES, partition_size=2),
            "partition_size=2 is inside a node of 2 ranks, where nothing is; use a partition_size over several nodes",
        ),
        ({"cache_parameters": "node", "hierarchical": False}, OVER_NODES, "needs a separate inter-node stage"),
        ({"cache_parameters": "rank", "hierarchical": False}, OVER_NODES, "nothing is; use"),
    ],
)
def test_where_nothing_is_cached_on_nodes_it_is_an_error(
    options: dict[str, Any], topology: Topology, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CommunicationOptions(**{**options, "cache_offload": True}).check(topology)
    CommunicationOptions(**{**options, "hierarchical": "auto", "cache_offload": False}).check(topology)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_value_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_offload=.* is neither True nor False"):
        CommunicationOptions(cache_offload=value)


# -- on ranks ----------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, **options: Any) -> Any:
    precision = options.pop("precision", "32-true")
    policy = Policy(**{"ranks_per_node": 2, "partition_size": 4, **options})
    return policy.shard(model, precision=precision, device=torch.device("cpu"), local_size=4)


def error_of(options: dict[str, Any], host_bytes: int | None = None, samples: int = 2) -> str:
    with ExitStack() as patches:
        for module in (policies, caches_on_host, activation_checkpointing) if host_bytes is not None else ():
            patches.enter_context(patch.object(module, "host_memory_bytes", lambda: host_bytes))
        try:
            model = lm()
            sharded = shard(model, **options)
            with sharded.schedule.micro_step(boundary=False):
                model(tokens(samples)).backward()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def bytes_beside_closed_form(precision: str, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes on the host as they are, and as they were computed before sharding."""
    model = lm().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    expected = bytes_on_host(
        model,
        find_blocks(model),
        OVER_NODES,
        communication=CommunicationOptions(**options, cache_offload=True),
        dtypes=mixed_precision_policy(precision, reduce_dtype=torch.float32),
    )
    schedule = shard(model, **options, cache_offload=True, precision=precision, reduce_dtype="float32").schedule
    with schedule.micro_step(boundary=False):
        model(tokens(2)).backward()
    return sum(tensor.nbytes for tensor in [*schedule.cache.tensors(), *schedule.window.tensors()]), expected


PLACES = [("node", "node"), ("node", "shard"), ("never", "node"), (0.67, 0.34)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_the_host_holds_as_many_bytes_as_are_checked_before(places: Any, precision: str, run_shared: Any) -> None:
    cache, sums = places
    options = {"cache_parameters": cache, "accumulate_gradients": sums}
    for held, expected in run_shared(4, partial(bytes_beside_closed_form, precision, options)):
        assert held == expected > 0


def test_what_does_not_fit_the_host_is_an_error_of_all_ranks_by_name(run_shared: Any) -> None:
    caches = {"cache_parameters": "node", "accumulate_gradients": "node", "cache_offload": True}
    (error,) = set(run_shared(4, partial(error_of, caches, 10_000)))
    assert error.startswith("HostMemoryError: cache_offload=True: caches and sums of 4 ranks take ")
    assert "75% of what the smallest host has; set cache_parameters and accumulate_gradients to a share" in error
    model = lm()
    states = measure_model(model, find_blocks(model).values(), offload="optimizer").per_rank_host_bytes(4)
    cached = chosen(replace(AUTO, cache_offload=True)).host_bytes
    enough_for_one = int(4 * 0.9 * (states + cached) / 0.75)
    assert set(run_shared(4, partial(error_of, caches, enough_for_one))) == {""}
    (error,) = set(run_shared(4, partial(error_of, {**caches, "offload": "optimizer"}, enough_for_one)))
    assert "of host memory and model states" in error


def test_caches_and_inputs_on_the_host_must_fit_together(run_shared: Any) -> None:
    caches = {"activation_checkpointing": True, "cache_parameters": "node", "accumulate_gradients": "shard"}
    model, options = lm(), CommunicationOptions(cache_parameters="node", cache_offload=True)
    dtypes = mixed_precision_policy("32-true")
    cached = bytes_on_host(model, find_blocks(model), OVER_NODES, communication=options, dtypes=dtypes)
    of_sample = 3 * 4 * tokens(1).shape[1] * model.embed.embedding_dim
    samples = round(1.5 * cached / of_sample)
    host_bytes = int(4.2 * cached / 0.75)  # half of that is for a rank, as two are on a node
    run = partial(partial, error_of, host_bytes=host_bytes, samples=samples)
    assert set(run_shared(4, run({**caches, "activation_offload": True}))) == {""}
    assert set(run_shared(4, run({**caches, "cache_offload": True}))) == {""}
    errors = run_shared(4, run({**caches, "activation_offload": True, "cache_offload": True}))
    message = (
        r"HostMemoryError: activation_offload=True: .*, beside .* of caches and sums \(cache_offload=True\), take more"
    )
    assert all(re.match(message, each) for each in errors)


def test_as_much_as_fits_is_no_error() -> None:
    check_caches_fit(60, states_bytes=40, host_bytes=401, processes=3)
    check_caches_fit(0, states_bytes=1000, host_bytes=401, processes=3)  # not about caches
    with pytest.raises(HostMemoryError, match=r"caches and sums of 3 ranks take .* and model states"):
        check_caches_fit(61, states_bytes=40, host_bytes=401, processes=3)


def test_auto_is_for_plans(run_shared: Any) -> None:
    (error,) = set(run_shared(4, partial(error_of, {"cache_offload": "auto"})))
    assert error.startswith("ValueError: cache_offload='auto' is for the recipes")
