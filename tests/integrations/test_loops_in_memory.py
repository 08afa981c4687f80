"""Loops of Fabric and Accelerate resume from the memory of nodes: the same losses, with random numbers at work."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.saver import StepSaver
from lightning_mics.integrations._in_memory import NoWholeStepError
from lightning_mics.integrations._keeper import keeper_settings
from tests.support import accelerators, loops
from tests.support.models import tokens
from tests.support.trainers import on_ranks

STEPS = 6

Seen = dict[str, Any]


class Counter:
    """Has a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def of_fabric(*, dies_at: int | None, loads: bool = True, **options: Any) -> Seen:
    """What one rank saw of a loop of Fabric: losses by step, where it began, weights after each step."""
    fabric = loops.start(**options)
    model = loops.network(seed=1 if dies_at is not None else 5)
    model, optimizer = fabric.setup(model, loops.adam(model))
    counter = Counter()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "counter": counter}
    torch.manual_seed(fabric.global_rank)
    rest = fabric.strategy.load_from_memory(state) if loads else None
    begun, losses = state["step"], {}
    seen = {begun: loops.weights(model)}
    for number in range(begun, STEPS):
        if number == dies_at:
            break
        loss = model(tokens(2, seed=10 * number + fabric.global_rank)) * (1 + torch.rand(()))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses[number] = loss.item().hex()
        seen[number + 1] = loops.weights(model)
        counter.count += 2
        state["step"] = number + 1
        fabric.strategy.save_in_memory(state)
    if dies_at in (None, STEPS):
        fabric.strategy.end_in_memory()
    return {"begun": begun, "rest": rest, "losses": losses, "count": counter.count, "weights": seen}


def of_accelerate(*, dies_at: int | None, loads: bool = True, **options: Any) -> Seen:
    """The same with Accelerate."""
    accelerator = accelerators.start(plugin=options)
    model, optimizer = accelerators.prepared(accelerator, loops.adam, seed=1 if dies_at is not None else 5)
    plugin = accelerators.plugin_of(accelerator)
    torch.manual_seed(accelerator.process_index)
    rest = plugin.load_from_memory(accelerator) if loads else None
    begun, losses, count = (0, {}, 0) if rest is None else (rest["step"], {}, rest["count"])
    seen = {begun: loops.weights(model)}
    for number in range(begun, STEPS):
        if number == dies_at:
            break
        loss = model(tokens(2, seed=10 * number + accelerator.process_index)) * (1 + torch.rand(()))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses[number] = loss.item().hex()
        seen[number + 1] = loops.weights(model)
        count += 2
        plugin.save_in_memory(accelerator, step=number + 1, count=count)
    if dies_at in (None, STEPS):
        plugin.end_in_memory()
    return {"begun": begun, "rest": rest, "losses": losses, "count": count, "weights": seen}


LOOPS = {"fabric": of_fabric, "accelerate": of_accelerate}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A job of its own, whose keeper is ended afterwards if it is still there."""
    token = secrets.token_hex(8)
    monkeypatch.setenv("MICS_KEEPER_TOKEN", token)
    yield token
    with suppress(OSError):
        KeeperConnection.local(keeper_settings({"MICS_KEEPER_TOKEN": token}, nodes=1)).ask({"do": "stop"})


@pytest.fixture(scope="module", params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[..., Seen]:
    """A loop of each framework."""
    return LOOPS[request.param]


@pytest.fixture(scope="module")
def undisturbed(run: Callable[..., Seen]) -> list[Seen]:
    """By rank, a loop in one piece, with the weights that a first part begins with."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MICS_KEEPER_TOKEN", secrets.token_hex(8))
        return on_ranks(partial(run, dies_at=STEPS))


def test_a_loop_that_is_started_again_has_the_same_losses_and_weights(
    token: str, run: Callable[..., Seen], undisturbed: list[Seen]
) -> None:
    first = on_ranks(partial(run, dies_at=3))
    again = on_ranks(partial(run, dies_at=None))
    for rank, whole in enumerate(undisturbed):
        assert first[rank]["rest"] is None and first[rank]["begun"] == 0
        assert again[rank]["begun"] in (2, 3)  # at most one step is lost
        assert {**first[rank]["losses"], **again[rank]["losses"]} == whole["losses"]
        assert all(first[rank]["losses"].get(step, loss) == loss for step, loss in again[rank]["losses"].items())
        assert again[rank]["count"] == 2 * STEPS
        loops.assert_same(again[rank]["weights"][STEPS], whole["weights"][STEPS])


def test_model_states_in_host_memory_come_back_too(
    token: str, run: Callable[..., Seen], undisturbed: list[Seen]
) -> None:
    offload = "optimizer" if run is of_fabric else True
    on_ranks(partial(run, dies_at=3, offload=offload))
    for again, whole in zip(on_ranks(partial(run, dies_at=None, offload=offload)), undisturbed, strict=True):
        assert again["begun"] in (2, 3)
        loops.assert_same(again["weights"][STEPS], whole["weights"][STEPS])


def test_fewer_ranks_go_on_from_the_same_weights(token: str, run: Callable[..., Seen]) -> None:
    first = on_ranks(partial(run, dies_at=3))[0]
    again = on_ranks(partial(run, dies_at=None, ranks_per_node=1, partition_size=1, **fewer(run)), world_size=2)
    for seen in again:
        assert seen["begun"] in (2, 3) and seen["count"] == 2 * STEPS
        loops.assert_same(seen["weights"][seen["begun"]], first["weights"][seen["begun"]])


def fewer(run: Callable[..., Seen]) -> dict[str, Any]:
    return {"devices": 2} if run is of_fabric else {}


def test_a_step_of_before_is_not_written_over_without_being_loaded(token: str, run: Callable[..., Seen]) -> None:
    on_ranks(partial(run, dies_at=2))
    with pytest.raises(Exception, match="call load_from_memory before the first save_in_memory"):
        on_ranks(partial(run, dies_at=None, loads=False))


def test_a_job_that_has_lost_its_memory_is_told(
    token: str, run: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(Exception, match=r"NoWholeStepError.*load the newest checkpoint of a disk instead"):
        on_ranks(partial(run, dies_at=2))
    found = on_ranks(partial(told_and_went_on, run))
    assert all(seen["losses"].keys() == set(range(STEPS)) for seen in found)


def told_and_went_on(run: Callable[..., Seen]) -> Seen:
    """A loop that handles the error, as one that then loads a checkpoint from a disk."""
    os.environ["MICS_KEEPER_TOKEN"] += "-2"
    from lightning_mics.integrations import _in_memory

    load = _in_memory.InMemoryLoop.load

    def handled(*args: Any, **options: Any) -> Any:
        with pytest.raises(NoWholeStepError):
            load(*args, **options)

    _in_memory.InMemoryLoop.load = handled  # type: ignore[method-assign]
    return run(dies_at=None)


def newest_after_steps(every: int) -> list[int]:
    """The newest whole step after each step of a loop of Fabric, whose saves come to other nodes slowly."""
    commit = StepSaver._commit

    def commit_slowly(self: StepSaver, *args: Any) -> None:
        time.sleep(0.2)
        commit(self, *args)

    StepSaver._commit = commit_slowly  # type: ignore[method-assign]
    fabric = loops.start(partition_size=2)
    model = loops.network(seed=1)
    model, optimizer = fabric.setup(model, loops.adam(model))
    whole = []
    for number in range(1, STEPS + 1):
        fabric.backward(model(tokens(2, seed=number)))
        optimizer.step()
        optimizer.zero_grad()
        loop = fabric.strategy._in_memory
        whole.append(-1 if loop is None else loop._started.job.saver.protected_step)
        if number % every == 0:
            fabric.strategy.save_in_memory({"model": model, "optimizer": optimizer})
    fabric.strategy.end_in_memory()
    return whole


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(("every", "expected"), [(1, [-1, 1, 2, 3, 4, 5]), (2, [-1, -1, 1, 1, 1, 2])])
def test_a_step_that_a_loop_saves_ends_when_the_one_before_is_whole(every: int, expected: list[int]) -> None:
    for whole in on_ranks(partial(newest_after_steps, every)):
        assert all(newest >= least for newest, least in zip(whole, expected, strict=True)), whole
