"""``Fabric(strategy="mics")``: accumulation, evaluation, clipping, precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2LMHeadModel

from tests.support.loops import (
    adam,
    alone,
    assert_same,
    network,
    set_up_in_one_call,
    sgd,
    start,
    step,
    two_batches_then_one,
    weights,
)
from tests.support.models import tokens
from tests.support.networks import GPT
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """By case, what each of four ranks has returned; all cases run in one set of processes."""
    return cases_on_ranks(
        {
            "accumulated": partial(accumulate, [True, True, False]),
            **{("several forwards", name): partial(several_forwards_first, POLICIES[name]) for name in POLICIES},
            **{("start over", how): partial(start_over, how) for how in ("at once", "save between")},
            "no boundary": step_without_a_boundary,
            "one beside another": accumulate_one_beside_another,
            "backward by hand": backward_by_hand,
            **{mode: partial(evaluate_then_train, mode) for mode in (torch.no_grad, torch.inference_mode)},
            "clipped by norm": partial(clip, {"max_norm": 0.01}),
            "clipped by value": partial(clip, {"clip_val": 1e-3}),
            **{precision: partial(precisions, precision) for precision in ("32-true", "bf16-mixed", "bf16-true")},
            "two models": train_two_models,
            "values": values_of_all_ranks,
        }
    )


def accumulate(enabled: list[bool]) -> dict[str, Tensor]:
    fabric = start()
    model = network()
    model, optimizer = fabric.setup(model, sgd(model))
    for index, accumulating in enumerate(enabled):
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(model(tokens(2, seed=10 * index + fabric.global_rank)) / len(enabled))
        assert all((parameter.grad is None) == accumulating for parameter in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    step(fabric, model, optimizer)  # what follows is in sync again
    return weights(model)


def test_no_backward_sync_accumulates_until_the_boundary_and_ends_after_it(seen: Seen) -> None:
    def accumulated() -> dict[str, Tensor]:
        model = network()
        optimizer = sgd(model)
        for index in range(3):
            (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4)) / 12).backward()
        optimizer.step()
        optimizer.zero_grad()
        (sum(model(tokens(2, seed=rank)) for rank in range(4)) / 4).backward()
        optimizer.step()
        return model.state_dict()

    for trained in seen["accumulated"]:
        assert_same(trained, accumulated(), 1e-6)


POLICIES: dict[str, dict[str, Any]] = {
    "a node a group": {},
    "gradients in every micro-step": {"partition_size": 4, "accumulate_gradients": "shard"},
}


def several_forwards_first(options: dict[str, Any]) -> dict[str, Tensor]:
    fabric = start(**options)
    model, optimizer = set_up_in_one_call(fabric)
    with fabric.no_backward_sync(model):
        losses = [model(tokens(2, seed=10 * index + fabric.global_rank)) / 2 for index in range(2)]
    for loss in losses:
        fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    step(fabric, model, optimizer)
    return weights(model)


@pytest.mark.parametrize("name", POLICIES)
def test_backwards_may_come_after_several_forwards(name: str, seen: Seen) -> None:
    for trained in seen["several forwards", name]:
        assert_same(trained, two_batches_then_one(), 1e-6)


def start_over(how: str) -> dict[str, Tensor]:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    with fabric.no_backward_sync(model):
        fabric.backward(model(tokens(2, seed=70 + fabric.global_rank)))
    optimizer.zero_grad()
    if how == "save between":
        with fabric.no_backward_sync(model):
            fabric.backward(model(tokens(2, seed=fabric.global_rank)) / 2)
        fabric.save(tempfile.mkdtemp() if fabric.global_rank == 0 else "", {"model": model, "optimizer": optimizer})
    else:
        with fabric.no_backward_sync(model):
            fabric.backward(model(tokens(2, seed=fabric.global_rank)) / 2)
    fabric.backward(model(tokens(2, seed=10 + fabric.global_rank)) / 2)
    model(tokens(2))  # with gradients, and nothing follows
    optimizer.step()
    optimizer.zero_grad()
    step(fabric, model, optimizer)
    return weights(model)


@pytest.mark.parametrize("how", ["at once", "save between"])
def test_zero_grad_starts_a_window_over(how: str, seen: Seen) -> None:
    for trained in seen["start over", how]:
        assert_same(trained, two_batches_then_one(), 1e-6)


def step_without_a_boundary() -> str:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    with fabric.no_backward_sync(model):
        fabric.backward(model(tokens(2)))
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_a_step_without_a_boundary_is_rejected(seen: Seen) -> None:
    for said in seen["no boundary"]:
        assert said.startswith("the root, blocks.0")
        assert (
            "run the last backward of a window as its boundary, outside of `no_backward_sync` or `no_sync`; after"
            in said
        )


def accumulate_one_beside_another() -> dict[str, Tensor]:
    fabric = start()
    one, two = network(1), network(2)
    one, first = fabric.setup(one, sgd(one))
    two, second = fabric.setup(two, sgd(two))
    with fabric.no_backward_sync(one):
        fabric.backward(one(tokens(2, seed=fabric.global_rank)) / 2)
    one(tokens(2))  # as a generator whose output is detached
    step(fabric, two, second)
    fabric.backward(one(tokens(2, seed=10 + fabric.global_rank)) / 2)
    first.step()
    first.zero_grad()
    step(fabric, one, first)
    return weights(one)


def test_one_model_may_accumulate_while_another_steps(seen: Seen) -> None:
    for trained in seen["one beside another"]:
        assert_same(trained, two_batches_then_one(), 1e-6)


def backward_by_hand() -> str:
    fabric = start()
    model, _ = set_up_in_one_call(fabric)
    with pytest.raises(RuntimeError) as error:
        model(tokens(2)).backward()
    return str(error.value)


def test_a_backward_that_fabric_does_not_see_is_rejected(seen: Seen) -> None:
    for said in seen["backward by hand"]:
        assert "fabric.backward" in said


def evaluate_then_train(mode: Callable[[], Any]) -> dict[str, Tensor]:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    with mode():
        first = model(tokens(2))
        assert not first.requires_grad and not first.is_inference()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    step(fabric, model, optimizer)
    with mode():
        assert model(tokens(2)) != first  # with the new weights
    step(fabric, model, optimizer, seed=1)
    return weights(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_any_mode_leaves_a_model_that_trains(mode: Callable[[], Any], seen: Seen) -> None:
    for trained in seen[mode]:
        assert_same(trained, alone(steps=2), 1e-6)


def clip(arguments: dict[str, float]) -> tuple[Any, dict[str, Tensor]]:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    fabric.backward(model(tokens(2, seed=fabric.global_rank)))
    norm = fabric.clip_gradients(model, optimizer, **arguments)
    optimizer.step()
    return norm, weights(model)


def test_gradients_are_clipped_by_their_norm_over_all_shards(seen: Seen) -> None:
    norms: list[Tensor] = []
    expected = alone(change=lambda model: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
    for norm, clipped in seen["clipped by norm"]:
        assert type(norm) is Tensor
        torch.testing.assert_close(norm, norms[0], rtol=0, atol=1e-6)
        assert_same(clipped, expected, 1e-6)


def test_gradients_are_clipped_by_value(seen: Seen) -> None:
    expected = alone(change=lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3))
    for norm, clipped in seen["clipped by value"]:
        assert norm is None
        assert_same(clipped, expected, 1e-6)


def precisions(precision: str) -> tuple[torch.dtype, torch.dtype]:
    fabric = start(precision=precision)
    with fabric.init_module():
        model = GPT2LMHeadModel(GPT)
    model, optimizer = fabric.setup(model, adam(model))
    before = weights(model)
    logits = model(tokens(2)).logits
    fabric.backward(logits.float().square().mean())
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    assert any(not value.equal(before[name]) for name, value in weights(model).items())
    return next(model.parameters()).dtype, logits.dtype


@pytest.mark.parametrize(
    ("precision", "parameters"),
    [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)],
)
def test_precision_is_as_in_fabric(precision: str, parameters: torch.dtype, seen: Seen) -> None:
    for stored, computed in seen[precision]:
        assert (stored, computed) == (parameters, torch.float32)  # Fabric converts what a forward returns


def train_two_models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = start()
    one, two = network(1), network(2)
    one, first = fabric.setup(one, sgd(one))
    two, second = fabric.setup(two, sgd(two))
    step(fabric, one, first)
    step(fabric, two, second)
    with torch.no_grad():
        one(tokens(2))
    step(fabric, two, second, seed=1)
    return weights(one), weights(two)


def test_two_models_train_side_by_side(seen: Seen) -> None:
    for one, two in seen["two models"]:
        assert_same(one, alone(), 1e-6)
        assert not two["norm.weight"].equal(one["norm.weight"])


def values_of_all_ranks() -> list[float]:
    fabric = start()
    value = torch.tensor(float(fabric.global_rank))
    return [float(fabric.all_reduce(value.clone(), reduce_op=op)) for op in ("mean", "sum", "max")]


def test_values_are_reduced_over_all_ranks(seen: Seen) -> None:
    assert seen["values"] == [[1.5, 6.0, 3.0]] * 4
