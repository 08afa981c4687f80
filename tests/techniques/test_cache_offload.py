"""Caches and sums of nodes that wait in host memory: the same bits and bytes, and at most two of each on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_mics import CommunicationOptions, Topology
from lightning_mics.techniques.cache_offload import AT_ONCE, HeldOnHost, HostCopies
from tests.support.beside_ddp import unsharded_state
from tests.support.fetched_ahead import TWO_BY_TWO, WIDTHS, Job
from tests.support.forked import run_cases
from tests.techniques.test_fetched_ahead import USAGES

NODE = CommunicationOptions.NODE
CACHE, SUMS = CommunicationOptions(cache_parameters="node"), CommunicationOptions(accumulate_gradients="node")
ONE_RANK_A_NODE = Topology(world_size=4, ranks_per_node=1, partition_size=4)
TWO_REPLICAS = Topology(world_size=4, ranks_per_node=1, partition_size=2)
FOUR_NODES = Topology(world_size=8, ranks_per_node=2, partition_size=8)
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
UNITS = 1 + len(WIDTHS)
FORKS = 5  # of ranks, each of which runs some cases

Usage = Callable[[Job], None]


# -- usages ------------------------------------------------------------------------------------------------------------


def windows(job: Job, micro_steps: int = 3) -> None:
    for _ in range(3):
        job.window(micro_steps)


def single_micro_steps(job: Job) -> None:
    windows(job, micro_steps=1)


def clip(job: Job) -> None:
    step = job.step

    def clipped() -> None:
        norm = nn.utils.clip_grad_norm_(job.model.parameters(), 0.05)
        assert norm > 0.05
        step()

    job.step = clipped  # type: ignore[method-assign]
    windows(job)


def autocast(job: Job) -> None:
    loss = job.loss

    def in_half() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    job.loss = in_half  # type: ignore[method-assign]
    windows(job)


def freeze(job: Job) -> None:
    """Frozen blocks stay cached over boundaries; one of them trains in part."""
    for block in (job.model.blocks[0], job.model.blocks[2][0], job.model.first):
        block.requires_grad_(False)
    windows(job)
    job.model.blocks[0].requires_grad_(True)
    windows(job, micro_steps=2)


def load_a_state_dict(job: Job) -> None:
    windows(job, micro_steps=2)
    state = {name: value.clone() for name, value in job.model.state_dict().items()}
    windows(job, micro_steps=2)
    job.model.load_state_dict(state)
    job.schedule.invalidate_cache()
    windows(job, micro_steps=2)


def raise_in_backward(job: Job) -> None:
    for abandons in (True, False):
        windows(job)

        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(_ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
                return hidden.clone()

            @staticmethod
            def backward(_ctx: Any, _gradient: torch.Tensor) -> Any:
                raise ValueError("in backward")

        with job.schedule.micro_step(boundary=False):
            job.loss().backward()
        handle = job.model.blocks[1].register_forward_hook(lambda *args: Failing.apply(args[2]))
        with pytest.raises(ValueError, match="in backward"), job.schedule.micro_step(boundary=not abandons):
            job.loss().backward()
        handle.remove()
        job.schedule.window.abandon()
        job.optimizer.zero_grad()
    windows(job)


OWN: dict[str, Usage] = {
    run.__name__: run
    for run in (windows, single_micro_steps, clip, autocast, freeze, load_a_state_dict, raise_in_backward)
}


# -- cases -------------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Topology, CommunicationOptions, dict[str, Any]]] = {
    "caches": (TWO_BY_TWO, CACHE, {}),
    "sums": (TWO_BY_TWO, SUMS, {}),
    "both": (TWO_BY_TWO, NODE, {}),
    "shares": (TWO_BY_TWO, CommunicationOptions(cache_parameters=0.5, accumulate_gradients=0.75), {}),
    "caches on ranks": (TWO_BY_TWO, CommunicationOptions(cache_parameters="rank", accumulate_gradients="node"), {}),
    "recomputed": (TWO_BY_TWO, NODE, {"activation_checkpointing": True}),
    "inputs on the host too": (TWO_BY_TWO, NODE, {"activation_checkpointing": True, "activation_offload": True}),
    "mixed precision": (TWO_BY_TWO, NODE, {"mixed_precision": HALF}),
    "one ahead": (TWO_BY_TWO, replace(CACHE, inter_node_prefetch=1), {}),
    "half of the bytes": (TWO_REPLICAS, replace(NODE, inter_node_reduce_dtype=torch.bfloat16), {}),
    "one rank a node, four nodes": (ONE_RANK_A_NODE, NODE, {}),
    "two replicas": (TWO_REPLICAS, NODE, {}),
    "states on the host too": (TWO_BY_TWO, NODE, {"offload": "optimizer"}),
}
CASES = [(places, "windows") for places in PLACES if places != "mixed precision"]
CASES += [("both", usage) for usage in (*OWN, *USAGES) if usage != "windows"]
CASES += [("mixed precision", "autocast"), ("shares", "freeze"), ("one ahead", "evaluate"), ("one ahead", "freeze")]
CASES += [("recomputed", "raise_in_backward"), ("caches", "evaluate"), ("sums", "freeze")]
LARGE = {"four nodes": (FOUR_NODES, NODE, {})}


def run(places: str, usage: str, *, offload: bool) -> dict[str, Any]:
    topology, communication, sharding = {**PLACES, **LARGE}[places]
    with watched() as seen:
        job = Job(replace(communication, cache_offload=offload), topology, **sharding)
        {**USAGES, **OWN}[usage](job)
        job.schedule.invalidate_cache()  # nothing is on the device
    return {
        "losses": torch.stack(job.losses),
        "weights": unsharded_state(job.model),
        "traffic": (job.schedule.traffic.by_technique(), job.collectives),
        **seen,
    }


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """What passes through the device inside: most tensors of a kind at once, and copies begun ahead of their use."""
    seen: dict[str, Any] = {"at once": 0, "put": 0, "fetched": 0, "on demand": 0, "left": 0}
    allocate, put, take, fetch = HostCopies.allocate, HeldOnHost.put, HeldOnHost.take, HeldOnHost.fetch
    every: list[HostCopies] = []

    def allocated(self: HostCopies, *args: Any, **kwargs: Any) -> Any:
        found = allocate(self, *args, **kwargs)
        seen["at once"] = max(seen["at once"], len(self._passing))
        every.append(self)
        return found

    def counted_put(self: HeldOnHost, values: torch.Tensor) -> None:
        seen["put"] += 1
        put(self, values)

    def counted_take(self: HeldOnHost) -> torch.Tensor:
        seen["on demand"] += self._fetched is None
        return take(self)

    def counted_fetch(self: HeldOnHost) -> None:
        seen["fetched"] += self._fetched is None
        fetch(self)

    with (
        mock.patch.object(HostCopies, "allocate", allocated),
        mock.patch.object(HeldOnHost, "put", counted_put),
        mock.patch.object(HeldOnHost, "take", counted_take),
        mock.patch.object(HeldOnHost, "fetch", counted_fetch),
    ):
        yield seen
    seen["left"] = sum(len(copies._passing) + len(copies.fetched) for copies in set(every))


class Ran(dict[tuple[str, str, bool], list[dict[str, Any]]]):
    """By places, usage and whether they are on the host, what each rank of a job has seen; forks run when asked."""

    def __missing__(self, key: tuple[str, str, bool]) -> list[dict[str, Any]]:
        case = key[:2]
        ranks, together = (4, CASES[CASES.index(case) % FORKS :: FORKS]) if case in CASES else (8, [case])
        cases = {
            (*each, offload): partial(run, *each, offload=offload) for each in together for offload in (True, False)
        }
        self.update(run_cases(ranks, cases))
        return self[key]


@pytest.fixture(scope="module")
def ran() -> Ran:
    return Ran()


@pytest.mark.parametrize(("places", "usage"), [*CASES, ("four nodes", "windows")])
def test_training_has_the_bits_and_the_bytes_that_it_has_on_the_device(places: str, usage: str, ran: Any) -> None:
    for one, other in zip(ran[places, usage, True], ran[places, usage, False], strict=True):
        assert torch.equal(one["losses"], other["losses"])
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in other["weights"])
        assert one["traffic"] == other["traffic"]
        assert one["put"] > 0 and other["put"] == 0
        assert 1 <= one["at once"] <= AT_ONCE
        assert one["left"] == 0


@pytest.mark.parametrize("usage", ["windows", "single_micro_steps"])
def test_values_come_back_ahead_of_their_use_once_two_micro_steps_were_alike(usage: str, ran: Any) -> None:
    for found in ran["both", usage, True]:
        ahead = found["fetched"] - found["on demand"]
        assert ahead > 0
    steady = ran["both", "windows", True][0]
    blocks = UNITS - 1
    # three windows of three micro-steps: slices of blocks in all passes but the first, of the root in later forwards
    slices = 3 * (3 * 2 - 1) * blocks + 3 * 2
    sums = 3 * 2 * UNITS
    assert steady["fetched"] == slices + sums
    assert steady["put"] == 3 * UNITS + 3 * 2 * UNITS
