"""The stage between nodes of the units that come next, run ahead: the same bits and bytes, in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import CommunicationOptions, Topology
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.policy.policy import Policy
from lightning_mics.techniques.micro_step_order import UseOrder
from tests.support.beside_ddp import unsharded_state
from tests.support.fetched_ahead import TWO_BY_TWO, WIDTHS, Job, Network, counted_fetches, samples_of
from tests.support.forked import run_cases

NODE, RANK, PAPER = CommunicationOptions.NODE, CommunicationOptions.RANK, CommunicationOptions.PAPER
ONE_RANK_A_NODE = Topology(world_size=4, ranks_per_node=1, partition_size=2)
INSIDE_A_NODE = Topology(world_size=4, ranks_per_node=2, partition_size=2)


# -- option sets -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Topology, CommunicationOptions, dict[str, Any]]] = {
    "as in the paper": (TWO_BY_TWO, PAPER, {}),
    "on nodes": (TWO_BY_TWO, NODE, {}),
    "on ranks": (TWO_BY_TWO, RANK, {}),
    "a share, recomputed": (TWO_BY_TWO, CommunicationOptions(cache_parameters=0.5), {"activation_checkpointing": True}),
    "unused allowed": (TWO_BY_TWO, CommunicationOptions(allow_unused=True), {}),
    "one rank a node": (ONE_RANK_A_NODE, PAPER, {}),
    "one rank a node, on nodes": (ONE_RANK_A_NODE, NODE, {}),
    "inside a node": (INSIDE_A_NODE, PAPER, {}),
    "flat": (TWO_BY_TWO, CommunicationOptions(hierarchical=False), {}),
}
WITHOUT_RAILS = ("inside a node", "flat")
CASES = [(name, ahead) for name in OPTIONS for ahead in (0, 1)] + [("as in the paper", 2)]
WINDOWS, MICRO_STEPS = 3, 3


def train(options: str, units_ahead: int) -> dict[str, Any]:
    topology, communication, sharding = OPTIONS[options]
    job = Job(replace(communication, inter_node_prefetch=units_ahead), topology, **sharding)
    with counted_fetches() as fetched:
        for _ in range(WINDOWS):
            job.window(MICRO_STEPS)
    return {
        "losses": torch.stack(job.losses),
        "weights": unsharded_state(job.model),
        "traffic": (job.schedule.traffic.by_technique(), job.collectives),
        "fetched": fetched,
        "in flight": [] if job.prefetch is None else list(job.prefetch.fetched),
    }


def in_one_process() -> Tensor:
    """Losses of each rank without sharding, with the samples of all ranks: [ranks, micro-steps]."""
    torch.manual_seed(0)
    model, losses = Network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for micro_step in range(WINDOWS * MICRO_STEPS):
        each = torch.stack([model(samples_of(micro_step, rank)).square().mean() for rank in range(4)])
        (each.mean() / MICRO_STEPS).backward()
        losses.append(each.detach())
        if (micro_step + 1) % MICRO_STEPS == 0:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses, dim=1)


@pytest.fixture(scope="module")
def trained() -> Any:
    """By option set and units ahead, what each rank of a job has seen."""
    return run_cases(4, {(name, ahead): partial(train, name, ahead) for name, ahead in CASES})


@pytest.mark.parametrize(("options", "ahead"), [case for case in CASES if case[1]])
def test_training_has_the_bits_and_the_collectives_that_it_has_without(options: str, ahead: int, trained: Any) -> None:
    for one, other in zip(trained[options, ahead], trained[options, 0], strict=True):
        assert torch.equal(one["losses"], other["losses"])
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in other["weights"])
        assert one["traffic"] == other["traffic"]
        assert one["in flight"] == []


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_are_those_of_one_process(options: str, trained: Any) -> None:
    expected = in_one_process()
    for rank, found in enumerate(trained[options, 1]):
        torch.testing.assert_close(found["losses"], expected[rank], rtol=1e-5, atol=1e-5)


BLOCKS = len(WIDTHS)


@pytest.mark.parametrize("options", OPTIONS)
def test_units_are_fetched_ahead_as_soon_as_two_micro_steps_were_alike(options: str, trained: Any) -> None:
    for found in trained[options, 1]:
        if options in WITHOUT_RAILS:
            assert found["fetched"] == []
        else:
            assert len(found["fetched"]) >= (WINDOWS - 2) * BLOCKS
    of_window = [f"blocks.{index}" for index in range(BLOCKS)]
    assert trained["on nodes", 1][0]["fetched"] == (WINDOWS - 2) * of_window
    backward = of_window[::-1]
    later = 2 * (WINDOWS - 1)  # micro-steps that are not the first of a window, without two that are remembered first
    assert trained["as in the paper", 1][0]["fetched"] == (later + WINDOWS - 2) * (of_window + backward)


# -- when they are fetched ---------------------------------------------------------------------------------------------


def stages_and_arithmetic() -> list[str]:
    """What a micro-step does in order, with one unit fetched ahead: stages along rails, waits for them, arithmetic."""
    job, log = Job(CommunicationOptions(inter_node_prefetch=1)), []
    job.window(micro_steps=1)
    job.window(micro_steps=1)
    for index, block in enumerate(job.model.blocks):
        block.register_forward_hook(lambda *_, index=index: log.append(f"forward {index}"))
        block.register_full_backward_hook(lambda *_, index=index: log.append(f"backward {index}"))
    gather = CountedGroup.all_gather

    def noted(self: CountedGroup, output: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = gather(self, output, *args, async_op=async_op, **kwargs)
        if "rails" in kwargs["technique"]:
            log.append(f"{'begin' if async_op else 'run'} {self._unit}")
        return Noted(work, lambda: log.append(f"wait {self._unit}")) if async_op else work

    with mock.patch.object(CountedGroup, "all_gather", noted):
        job.window(micro_steps=1)
    return log


class Noted:
    """Work that tells when it is waited for."""

    def __init__(self, work: dist.Work, noted: Callable[[], None]) -> None:
        self._work, self._noted = work, noted

    def wait(self) -> None:
        assert self._work is not None
        self._noted()
        self._work.wait()


def test_a_stage_along_rails_begins_before_the_arithmetic_of_the_unit_before_and_is_waited_for_after_it(
    run_shared: Any,
) -> None:
    for log in run_shared(4, stages_and_arithmetic):
        place = {entry: index for index, entry in enumerate(log) if "blocks" not in entry}
        begun = {unit: [i for i, entry in enumerate(log) if entry == f"begin blocks.{unit}"] for unit in range(BLOCKS)}
        waits = {unit: [i for i, entry in enumerate(log) if entry == f"wait blocks.{unit}"] for unit in range(BLOCKS)}
        assert [entry for entry in log if entry.startswith("run")] == ["run root"]
        for unit in range(1, BLOCKS):
            assert begun[unit][0] < place[f"forward {unit - 1}"] < waits[unit][0] < place[f"forward {unit}"]
        for unit in range(BLOCKS - 2):  # FSDP2 gathers the next one before the arithmetic of this one itself
            assert begun[unit][1] < place[f"backward {unit + 2}"] < waits[unit][1] < place[f"backward {unit + 1}"]


# -- the order that is expected ----------------------------------------------------------------------------------------


def order_of(*micro_steps: str) -> UseOrder:
    order = UseOrder()
    for micro_step in micro_steps:
        for unit in micro_step:
            order.add((unit, False))  # type: ignore[arg-type]
        order.end()
    return order


@pytest.mark.parametrize(
    ("before", "now", "coming"),
    [
        (["abc"], "a", ""),
        (["abc", "abc"], "", "ab"),
        (["abc", "abc"], "a", "bc"),
        (["abc", "abc"], "abc", ""),
        (["abc", "abd"], "a", "b"),
        (["abc", "abc"], "ac", ""),
        (["abc", "xbc"], "", ""),
        (["abc", "xbc", "xbc"], "xb", "c"),
        (["aab", "aab"], "a", "ab"),
    ],
)
def test_what_two_micro_steps_did_alike_is_expected_as_long_as_it_happens(
    before: list[str], now: str, coming: str
) -> None:
    order = order_of(*before)
    for unit in now:
        order.add((unit, False))  # type: ignore[arg-type]
    assert "".join(map(str, order.coming(2))) == coming


def test_only_a_plan_can_choose_the_number_of_units() -> None:
    options = CommunicationOptions(inter_node_prefetch="auto")
    message = r"inter_node_prefetch='auto' is for the recipes.*use a number of blocks, such as 1, or 0"
    with pytest.raises(ValueError, match=message):
        options.check_chosen()
    policy = Policy(inter_node_prefetch="auto", partition_size=1)
    with pytest.raises(ValueError, match=message):
        policy.shard(nn.Sequential(nn.Linear(2, 2)), precision="32-true", device=torch.device("cpu"), local_size=1)


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None])
def test_other_numbers_of_units_are_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"inter_node_prefetch=.* is neither 0 nor a positive integer"):
        CommunicationOptions(inter_node_prefetch=value)
