"""``Accelerator(fsdp_plugin=MiCSPlugin())``: preparing models, optimizers and data."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from lightning_mics._torch import process_groups
from lightning_mics.sharding.sharded import sharded
from tests.support.accelerators import prepared, start, step
from tests.support.loops import adam, alone, assert_same, network, weights
from tests.support.models import tokens
from tests.support.networks import GPT
from tests.support.trainers import cases_on_ranks

Seen = dict[Any, list[Any]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """By case, what each of four ranks has returned; all cases run in one set of processes."""
    return cases_on_ranks(
        {
            "without our plugin": without_our_plugin,
            "handles": handles,
            "trained": train,
            "data": data_of_ranks,
            "bfloat16": bfloat16,
            "exit": seconds_at_exit,
        }
    )


def handles() -> list[bool]:
    accelerator = start()
    model, _ = prepared(accelerator)
    around = nn.ModuleDict({"student": model, "teacher": network()})
    return [sharded(each) is vars(model)["_mics"] for each in (model, torch.compile(model), around)]


def test_the_handle_of_a_model_is_found_from_its_wrappers(seen: Seen) -> None:
    assert seen["handles"] == [[True] * 3] * 4


def train() -> dict[str, Tensor]:
    accelerator = start()
    assert accelerator.is_fsdp2
    model, optimizer = prepared(accelerator)
    assert sharded(model).groups.topology.partition_size == 2
    for index in range(2):
        step(accelerator, model, optimizer, seed=index)
    return weights(model)


def test_it_trains_as_one_process(seen: Seen) -> None:
    for trained in seen["trained"]:
        assert_same(trained, alone(steps=2), 1e-6)


def data_of_ranks() -> list[int]:
    accelerator = start()
    data = accelerator.prepare(DataLoader(list(range(8)), batch_size=1))
    gathered = accelerator.gather(torch.cat(list(data)))
    assert sorted(gathered.tolist()) == list(range(8))
    return [int(value) for value in data]


def test_each_rank_has_data_of_its_own(seen: Seen) -> None:
    assert len({value for of_rank in seen["data"] for value in of_rank}) == 8


def without_our_plugin() -> tuple[bool, str]:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = Accelerator(cpu=True)
    model, _ = prepared(accelerator)
    return "_mics" in vars(model), str(accelerator.distributed_type)


def test_other_plugins_are_not_affected(seen: Seen) -> None:
    assert seen["without our plugin"] == [(False, "DistributedType.MULTI_CPU")] * 4


def bfloat16() -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    accelerator = start(mixed_precision="bf16")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT).to(torch.bfloat16)
    model, optimizer = accelerator.prepare(model, adam(model))
    computed: list[torch.dtype] = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *seen: computed.append(seen[-1].dtype))
    before = weights(model)
    loss = model(tokens(2), labels=tokens(2)).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert any(not value.equal(before[name]) for name, value in weights(model).items())
    assert type(accelerator.unwrap_model(model, keep_fp32_wrapper=False).forward).__name__ == "method"
    return next(model.parameters()).dtype, computed[0], loss.dtype


def test_mixed_precision_keeps_weights_in_float32_and_computes_in_bfloat16(seen: Seen) -> None:
    assert seen["bfloat16"] == [(torch.float32, torch.bfloat16, torch.float32)] * 4


def seconds_at_exit() -> float:
    """How long the interpreter is asked to wait at its end for gloo's threads."""
    with mock.patch("atexit.register") as register:
        start()
    (wait,) = {call.args[0] for call in register.call_args_list if call.args[0].__module__ == process_groups.__name__}
    begin = time.monotonic()
    wait()
    return time.monotonic() - begin


def test_the_interpreter_waits_for_gloo_before_it_ends(seen: Seen) -> None:
    for seconds in seen["exit"]:
        assert 0.1 < seconds < 5
