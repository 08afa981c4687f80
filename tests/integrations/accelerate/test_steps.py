"""``Accelerator(fsdp_plugin=MiCSPlugin())``: accumulation, clipping, evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.accelerators import plugin_of, prepared, start, step
from tests.support.loops import alone, assert_same, network, sgd, two_batches_then_one, weights
from tests.support.models import tokens
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """By case, what each of four ranks has returned; all cases run in one set of processes."""
    return cases_on_ranks(
        {
            "accumulated": accumulate_by_hand,
            "several forwards": several_forwards_first,
            **{("start over", how): partial(start_over, how) for how in WAYS},
            **{("every micro-step", name): partial(every_micro_step_a_boundary, POLICIES[name]) for name in POLICIES},
            "prepared again": prepare_again,
            "compiled": compiled,
            "end of the data": accumulate_to_the_end_of_data,
            "clipped by norm": partial(clip, False),
            "clipped by value": partial(clip, True),
            **{mode: partial(evaluate_then_train, mode) for mode in (torch.no_grad, torch.inference_mode)},
        }
    )


def accumulate_by_hand() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    for index in range(2):
        with accelerator.no_sync(model):
            accelerator.backward(model(tokens(2, seed=10 * index + accelerator.process_index)) / 3)
        assert all(parameter.grad is None for parameter in model.parameters())
    accelerator.backward(model(tokens(2, seed=20 + accelerator.process_index)) / 3)
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)  # what follows is in sync again
    return weights(model)


def test_no_sync_accumulates_until_the_boundary_and_ends_after_it(seen: Seen) -> None:
    model = network()
    optimizer = sgd(model)
    for index in range(3):
        (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4)) / 12).backward()
    optimizer.step()
    optimizer.zero_grad()
    (sum(model(tokens(2, seed=rank)) for rank in range(4)) / 4).backward()
    optimizer.step()
    for trained in seen["accumulated"]:
        assert_same(trained, dict(model.state_dict()), 1e-6)


def several_forwards_first() -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    with accelerator.no_sync(model):
        losses = [model(tokens(2, seed=10 * index + accelerator.process_index)) / 2 for index in range(2)]
    accelerator.backward(losses[0])
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(losses[1])
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)
    return weights(model)


def test_backwards_may_come_after_several_forwards(seen: Seen) -> None:
    for trained in seen["several forwards"]:
        assert_same(trained, two_batches_then_one(), 1e-6)


WAYS = ["zero_grad", "load_checkpoint", "load_state"]


def start_over(how: str) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    plugin_of(accelerator).save_checkpoint(accelerator, f"{folder}/ours")
    accelerator.save_state(f"{folder}/state")
    with accelerator.no_sync(model):
        accelerator.backward(model(tokens(2, seed=70 + accelerator.process_index)))
    if how == "zero_grad":
        optimizer.zero_grad()
    elif how == "load_checkpoint":
        plugin_of(accelerator).load_checkpoint(accelerator, f"{folder}/ours")
    else:
        accelerator.load_state(f"{folder}/state")
    with accelerator.no_sync(model):
        accelerator.backward(model(tokens(2, seed=accelerator.process_index)) / 2)
    plugin_of(accelerator).save_checkpoint(accelerator, f"{folder}/inside")
    accelerator.save_state(f"{folder}/inside state")
    accelerator.backward(model(tokens(2, seed=10 + accelerator.process_index)) / 2)
    model(tokens(2))  # with gradients, and nothing follows
    optimizer.step()
    optimizer.zero_grad()
    step(accelerator, model, optimizer)
    return weights(model)


@pytest.mark.parametrize("how", WAYS)
def test_a_window_starts_over_and_may_be_saved_in(how: str, seen: Seen) -> None:
    for trained in seen["start over", how]:
        assert_same(trained, two_batches_then_one(), 1e-6)


POLICIES: dict[str, dict[str, Any]] = {
    "a node a group": {},
    "parameters at every use": {"partition_size": 4, "cache_parameters": "never"},
}


def every_micro_step_a_boundary(plugin: dict[str, Any]) -> dict[str, Tensor]:
    accumulation = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = start(plugin=plugin, gradient_accumulation_plugin=accumulation)
    model, optimizer = prepared(accelerator)
    for index in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens(2, seed=10 * index + accelerator.process_index)))
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens(2, seed=accelerator.process_index)))
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("name", POLICIES)
def test_every_micro_step_may_synchronize(name: str, seen: Seen) -> None:
    for trained in seen["every micro-step", name]:
        assert_same(trained, two_batches_then_one(), 1e-6)


def prepare_again() -> tuple[bool, int, bool]:
    accelerator = start(gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    again, _, nothing = accelerator.prepare(model, optimizer, None)
    accelerator.gradient_accumulation_steps = 1  # in the middle of a run
    step(accelerator, again, optimizer)
    second = Accelerator(cpu=True)  # as the Trainer of transformers makes one
    assert isinstance(second.state.fsdp_plugin, MiCSPlugin) and second.is_fsdp2
    return again is model, len({id(known) for known in accelerator._models}), nothing is None


def test_preparing_twice_changes_nothing_and_a_second_accelerator_shares_the_plugin(seen: Seen) -> None:
    assert seen["prepared again"] == [(True, 1, True)] * 4


def compiled() -> dict[str, Tensor]:
    accelerator = start()
    model = torch.compile(network(), backend="aot_eager")
    model, optimizer = accelerator.prepare(model, sgd(model))
    step(accelerator, model, optimizer)
    return {name.removeprefix("_orig_mod."): value for name, value in weights(model).items()}


def test_a_compiled_model_trains(seen: Seen) -> None:
    for trained in seen["compiled"]:
        assert_same(trained, alone(), 1e-6)


def accumulate_to_the_end_of_data() -> tuple[int, list[bool]]:
    accelerator = start(gradient_accumulation_steps=4)
    model, optimizer = prepared(accelerator)
    data = accelerator.prepare(DataLoader(tokens(24), batch_size=1))
    steps, boundaries = 0, []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch))
            boundaries.append(all(parameter.grad is not None for parameter in model.parameters()))
            assert accelerator.sync_gradients == boundaries[-1]
            steps += accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
    return steps, boundaries


def test_the_end_of_the_data_is_a_boundary(seen: Seen) -> None:
    assert seen["end of the data"] == [(2, [False] * 3 + [True] + [False] + [True])] * 4


def clip(by_value: bool) -> tuple[Any, dict[str, Tensor]]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    accelerator.backward(model(tokens(2, seed=accelerator.process_index)))
    norm = None
    if by_value:  # Accelerate's own method rejects FSDP of any kind
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    else:
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm, weights(model)


def test_gradients_are_clipped_by_their_norm_over_all_shards(seen: Seen) -> None:
    norms: list[Tensor] = []
    expected = alone(change=lambda model: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
    for norm, clipped in seen["clipped by norm"]:
        torch.testing.assert_close(norm, norms[0], rtol=0, atol=1e-6)
        assert_same(clipped, expected, 1e-6)


def test_gradients_are_clipped_by_value(seen: Seen) -> None:
    expected = alone(change=lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3))
    for _, clipped in seen["clipped by value"]:
        assert_same(clipped, expected, 1e-6)


def evaluate_then_train(mode: Callable[[], Any]) -> dict[str, Tensor]:
    accelerator = start()
    model, optimizer = prepared(accelerator)
    with mode():
        model(tokens(2))
    step(accelerator, model, optimizer)
    with mode():
        model(tokens(2))
    step(accelerator, model, optimizer, seed=1)
    return weights(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_any_mode_leaves_a_model_that_trains(mode: Callable[[], Any], seen: Seen) -> None:
    for trained in seen[mode]:
        assert_same(trained, alone(steps=2), 1e-6)
