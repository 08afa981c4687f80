"""Cached weights are never used after the weights have changed, by any means."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from lightning_mics import AccumulationSchedule, CommunicationOptions, Topology, shard_model
from tests.support.groups import groups_for
from tests.support.models import DIM, Stack

TOPOLOGY = Topology(world_size=4, ranks_per_node=2, partition_size=4)


FACTOR = 1.5


REFUSED = "weights changed, in a way that torch does not record"


@pytest.fixture(
    scope="module",
    params=[
        CommunicationOptions.NODE,
        CommunicationOptions.RANK,
        CommunicationOptions(hierarchical=False, cache_parameters="node"),
    ],
    ids=["cached by nodes", "cached by ranks", "cached by nodes, flat"],
)
def options(request):
    return request.param


def _weights(model: Stack) -> list[nn.Parameter]:
    return [layer.weight for layer in model.layers]


@torch.no_grad()
def _in_place(model: Stack) -> None:
    for weight in _weights(model):
        weight.mul_(FACTOR)


@torch.no_grad()
def _copied(model: Stack) -> None:
    for weight in _weights(model):
        weight.copy_(weight * FACTOR)


@torch.no_grad()
def _initialized(model: Stack) -> None:
    for weight in _weights(model):
        nn.init.constant_(weight, 0.3)


def _detached(model: Stack) -> None:
    for weight in _weights(model):
        weight.detach().mul_(FACTOR)


@torch.no_grad()
def _as_local_tensor(model: Stack) -> None:
    for weight in _weights(model):
        weight.to_local().mul_(FACTOR)


def _loaded(model: Stack) -> None:
    model.load_state_dict({name: tensor * FACTOR for name, tensor in model.state_dict().items()})


def _set_whole(model: Stack) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    set_model_state_dict(model, {name: tensor * FACTOR for name, tensor in whole.items()}, options=options)


def _read_in_place(model: Stack) -> None:
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    other = {name: tensor * FACTOR for name, tensor in model.state_dict().items()}
    dcp.save(other, checkpoint_id=folders[0])
    dcp.load(model.state_dict(), checkpoint_id=folders[0])


def _stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Stack], None]:
    def step(model: Stack) -> None:
        optimizer = make(list(model.parameters()))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _through_data(model: Stack) -> None:
    for weight in _weights(model):
        weight.data.mul_(FACTOR)


@torch.no_grad()
def _foreach(model: Stack) -> None:
    torch._foreach_mul_(_weights(model), FACTOR)


@torch.no_grad()
def _through_memory(model: Stack) -> None:
    for weight in _weights(model):
        array = weight.to_local().numpy()
        array *= FACTOR


KNOWN = {
    "in place": _in_place,
    "copy_": _copied,
    "nn.init": _initialized,
    "detach": _detached,
    "to_local": _as_local_tensor,
    "load_state_dict": _loaded,
    "set_model_state_dict": _set_whole,
    "data": _through_data,
    "foreach": _foreach,
    "SGD": _stepped(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD, one by one": _stepped(lambda p: torch.optim.SGD(p, lr=0.1, foreach=False)),
    "AdamW": _stepped(lambda p: torch.optim.AdamW(p, lr=0.1)),
    "AdamW, foreach": _stepped(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "AdamW, fused": _stepped(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
}


UNKNOWN = {"memory": _through_memory, "dcp.load": _read_in_place}


INSIDE, BETWEEN = list(KNOWN), [*KNOWN, *UNKNOWN]


@pytest.fixture(scope="module")
def seen(options, run_shared):
    """By route, inside a window and between steps: what :func:`_loss_after` saw on each rank."""
    return run_shared(4, _change_by_every_route, options)


def _change_by_every_route(options: CommunicationOptions) -> dict[tuple[str, str], tuple[float, float, float]]:
    model, schedule = _make(options)
    initial = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_after(change: Callable[[Stack], None], *, inside: bool) -> tuple[float, float, float]:
        model.reshard()  # FSDP2 leaves the root gathered
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(value)
        schedule.invalidate_cache()
        model.zero_grad()
        return _loss_after(change, model, schedule, inside=inside)

    results = {("inside", route): loss_after(KNOWN[route], inside=True) for route in INSIDE}
    for route, change in {**KNOWN, **UNKNOWN}.items():
        results["between", route] = loss_after(change, inside=False)
    return results


def _loss_after(
    change: Callable[[Stack], None], model: Stack, schedule: AccumulationSchedule, *, inside: bool
) -> tuple[float, float, float]:
    """The loss before a change, after it, and after it with weights that were gathered anew."""
    x = torch.randn(2, DIM, generator=torch.Generator().manual_seed(3))
    if inside:
        before, after = _train_around(lambda: change(model), model, schedule, x)
    else:  # as a user may do it: a forward and its backward, the change, and so on
        before = model(x)
        before.backward()
        change(model)
        after = model(x)
    model.reshard()
    schedule.invalidate_cache()
    with torch.no_grad():
        anew = model(x)
    return before.item(), after.item(), anew.item()


def _train_around(
    change: Callable[[], None], model: Stack, schedule: AccumulationSchedule, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of a micro-step before a change and of the boundary after it."""
    with schedule.micro_step(boundary=False):
        before = model(x)
        before.backward()
    change()
    with schedule.micro_step(boundary=True):
        after = model(x)
        after.backward()
    return before, after


def _make(options: CommunicationOptions) -> tuple[Stack, AccumulationSchedule]:
    torch.manual_seed(0)
    model = Stack()
    return model, shard_model(model, groups_for(TOPOLOGY, options), communication=options)


@pytest.mark.parametrize(("where", "route"), [("inside", r) for r in INSIDE] + [("between", r) for r in BETWEEN])
def test_the_next_forward_uses_the_changed_weights(seen, where, route):
    for of_rank in seen:
        before, after, anew = of_rank[where, route]
        assert abs(after - before) > 1e-3 * before  # the change was one
        assert after == anew


@pytest.mark.parametrize("route", UNKNOWN)
def test_an_unrecorded_change_inside_a_window_raises_before_the_optimizer_steps(route, options, run_shared):
    for message in run_shared(4, _refusal, _change_unnoticed, options, route, False):
        assert message.startswith(REFUSED + " (in raw memory")


@pytest.mark.parametrize("route", UNKNOWN)
def test_invalidate_cache_makes_an_unrecorded_change_effective(route, options, run_shared):
    for before, after, anew in run_shared(4, _change_unnoticed, options, route, True):
        assert abs(after - before) > 1e-3 * before
        assert after == anew


def _refusal(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args)
    return str(caught.value)


def _change_unnoticed(options: CommunicationOptions, route: str, tell: bool) -> tuple[float, float, float]:
    model, schedule = _make(options)

    def change() -> None:
        UNKNOWN[route](model)
        if tell:
            schedule.invalidate_cache()

    x = torch.randn(2, DIM, generator=torch.Generator().manual_seed(3))
    before, after = _train_around(change, model, schedule, x)
    model.reshard()
    with torch.no_grad():
        return before.item(), after.item(), model(x).item()


def test_a_change_that_is_undone_before_the_boundary_raises_too(options, run_shared):
    for message in run_shared(4, _refusal, _perturb_for_one_micro_step, options):
        assert message.startswith(REFUSED)


def _perturb_for_one_micro_step(options: CommunicationOptions) -> None:
    model, schedule = _make(options)
    for factor, boundary in ((1, False), (2, False), (0.5, True)):
        for weight in _weights(model):
            array = weight.detach().to_local().numpy()
            array *= factor
        with schedule.micro_step(boundary=boundary):
            model(torch.randn(2, DIM)).backward()


def test_an_unrecorded_change_during_an_evaluation_raises_at_its_end(options, run_shared):
    for message in run_shared(4, _refusal, _change_during_evaluation, options):
        assert message.startswith(REFUSED)


def _change_during_evaluation(options: CommunicationOptions) -> None:
    model, schedule = _make(options)
    with torch.no_grad(), schedule.cached_weights():
        model(torch.randn(2, DIM))
        _through_memory(model)
        model(torch.randn(2, DIM))


def test_nan_weights_count_as_unchanged(options, run_shared):
    run_shared(4, _train_with_nan, options)


def _train_with_nan(options: CommunicationOptions) -> None:
    model, schedule = _make(options)
    with torch.no_grad():
        model.first.weight.fill_(torch.nan)
    for boundary in (False, True):
        with schedule.micro_step(boundary=boundary):
            model(torch.randn(2, DIM)).backward()


def test_a_step_of_another_models_optimizer_does_not_drop_the_cache(options, run_shared):
    for before, after in run_shared(4, _step_another_model, options):
        assert before == after > 0


def _step_another_model(options: CommunicationOptions) -> tuple[float, float]:
    model, schedule = _make(options)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(2)).sum().backward()
    with schedule.micro_step(boundary=False):
        model(torch.randn(2, DIM)).backward()
    before = _gathered_between_nodes(schedule)
    if dist.get_rank() == 0:  # what others do not do must not make this rank gather alone
        optimizer.step()
    with schedule.micro_step(boundary=True):
        model(torch.randn(2, DIM)).backward()
    return before, _gathered_between_nodes(schedule)


def _gathered_between_nodes(schedule: AccumulationSchedule) -> float:
    sent = schedule.traffic.by_technique()
    return sum(each.between_bytes for technique, each in sent.items() if technique.startswith("gather"))
