"""What loading a checkpoint restores: weights, states of optimizers and of modules, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_mics.checkpoint.optimizer_states import optimizer_state
from tests.support.checkpoints import (
    MakeOptimizer,
    WithExtraState,
    WithSpareBlock,
    adamw,
    is_same,
    load_into,
    momentum,
    save_file,
    save_shards,
    sgd,
    sharded_model,
    slots_of,
    train_steps,
    weights_of,
)
from tests.support.forked import Run
from tests.support.models import Block, OneBlock, TinyLM, tokens


def _round_trips() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for save in (save_shards, save_file):
            for make in (sgd, momentum, adamw):
                facts[save.__name__, make.__name__] = _round_trip(Path(shared[0], f"{save}{make}"), save, make)
            facts[save.__name__, "spare"] = _round_trip(Path(shared[0], f"{save}"), save, adamw, WithSpareBlock)
            facts[save.__name__, "extra"] = _round_trip(Path(shared[0], f"{save}e"), save, adamw, WithExtraState)
        dist.barrier()
    return facts


def _round_trip(path: Path, save: Any, make: MakeOptimizer, model_class: type[nn.Module] = OneBlock) -> dict[str, Any]:
    model = sharded_model(make=model_class, nodes=2)
    first, optimizer = weights_of(model), make(model.parameters())
    train_steps(model, optimizer)
    model.seen = 3
    save(path, model, optimizer)
    resumed = sharded_model(seed=1, make=model_class, nodes=1)
    again = make(resumed.parameters())
    load_into(path, resumed, again)
    facts = {
        "trained": not is_same(first, weights_of(model)),
        "weights": is_same(weights_of(model), weights_of(resumed)),
        "slots": is_same(slots_of(optimizer), slots_of(again)),
        "without slots": sum(not slots for slots in slots_of(again)),
        "seen": getattr(resumed, "seen", None),
    }
    train_steps(model, optimizer)
    train_steps(resumed, again)
    later = weights_of(model)
    facts["later"] = all(
        torch.allclose(value, later[name], atol=1e-6)
        for name, value in weights_of(resumed).items()
        if "extra" not in name
    )
    return facts


@pytest.fixture(scope="module")
def round_trips(run_shared: Run) -> dict[str, Any]:
    return run_shared(2, _round_trips)[0]


@pytest.mark.parametrize("save", ["save_shards", "save_file"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_two_replicas_resume_as_one_partition_group_bit_for_bit(round_trips: Any, save: str, optimizer: str) -> None:
    facts = round_trips[save, optimizer]
    assert facts["trained"]
    assert facts["weights"]
    assert facts["slots"]
    assert facts["later"]


@pytest.mark.parametrize("save", ["save_shards", "save_file"])
def test_a_block_that_was_never_used_resumes_without_optimizer_state(round_trips: Any, save: str) -> None:
    facts = round_trips[save, "spare"]
    assert facts["slots"]
    assert facts["without slots"] == len(list(Block(7).parameters()))
    assert facts["later"]


@pytest.mark.parametrize("save", ["save_shards", "save_file"])
def test_extra_state_of_a_module_is_restored(round_trips: Any, save: str) -> None:
    assert round_trips[save, "extra"]["seen"] == 3
    assert round_trips[save, "extra"]["weights"]


def _saved_before_the_first_step(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for make in (momentum, adamw):
        model, undisturbed = sharded_model(make=OneBlock), sharded_model(make=OneBlock)
        optimizer, plain = make(model.parameters()), make(undisturbed.parameters())
        save_shards(folder / make.__name__, model, optimizer)
        optimizer_state(model, optimizer, sharded=False)
        facts[make.__name__, "state"] = len(optimizer.state)
        resumed = sharded_model(seed=1, make=OneBlock)
        again = make(resumed.parameters())
        train_steps(resumed, again)
        load_into(folder / make.__name__, resumed, again)
        for each, its in ((model, optimizer), (undisturbed, plain), (resumed, again)):
            train_steps(each, its)
        facts[make.__name__, "saved"] = is_same(weights_of(model), weights_of(undisturbed))
        facts[make.__name__, "resumed"] = is_same(weights_of(resumed), weights_of(undisturbed))
    return facts


def test_saving_before_the_first_step_changes_neither_the_run_nor_one_that_resumes(
    tmp_path: Path, run_shared: Run
) -> None:
    facts = run_shared(2, _saved_before_the_first_step, tmp_path)[0]
    for make in ("momentum", "adamw"):
        assert facts[make, "state"] == 0
        assert facts[make, "saved"]
        assert facts[make, "resumed"]


def _options(folder: Path) -> dict[str, Any]:
    model = sharded_model(make=OneBlock)
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.5)
    train_steps(model, optimizer)
    save_shards(folder / "shards", model, optimizer)
    save_file(folder / "file", model, optimizer)
    facts = {}
    for name in ("shards", "file"):
        resumed = sharded_model(seed=1, make=OneBlock)
        again = sgd(resumed.parameters())
        load_into(folder / name, resumed, again)
        facts[name] = (
            again.param_groups[0]["lr"],
            again.param_groups[0]["momentum"],
            is_same(slots_of(again), slots_of(optimizer)),
        )
    return facts


def test_options_come_from_the_checkpoint_with_the_state_that_they_need(tmp_path: Path, run_shared: Run) -> None:
    facts = run_shared(2, _options, tmp_path)[0]
    assert facts == {"shards": (0.3, 0.5, True), "file": (0.3, 0.5, True)}


def _frozen_and_grouped(folder: Path) -> dict[str, Any]:
    def make(model: nn.Module) -> list[Optimizer]:
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
        decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
        others = [p for name, p in model.named_parameters() if not name.endswith("weight")]
        return [AdamW([{"params": decayed}, {"params": others[:3], "weight_decay": 0.0}]), momentum(others[3:])]

    model = sharded_model()
    optimizers = make(model)
    train_steps(model, optimizers[0])
    model(tokens(2)).backward()
    optimizers[1].step()
    save_shards(folder / "shards", model, *optimizers)
    save_file(folder / "file", model, *optimizers)
    facts: dict[str, Any] = {}
    for name in ("shards", "file"):
        resumed = sharded_model(seed=1)
        again = make(resumed)
        load_into(folder / name, resumed, *again)
        facts[name] = [is_same(slots_of(one), slots_of(other)) for one, other in zip(optimizers, again, strict=True)]
        facts[name] += [again[0].param_groups[1]["weight_decay"], len(slots_of(again[0])), len(again[0].state)]
    if dist.get_rank() == 0:
        state = torch.load(folder / "file", weights_only=True)["optimizer_states"][0]
        facts["numbers"] = {number: tuple(slots["exp_avg"].shape) for number, slots in state["state"].items()}
        facts["groups"] = [group["params"] for group in state["param_groups"]]
        plain = TinyLM()
        facts["shapes"] = [tuple(parameter.shape) for parameter in plain.parameters()]
        alone = make(plain)[0]
        alone.load_state_dict(state)
        facts["alone"] = all(p.shape == slots["exp_avg"].shape for p, slots in alone.state.items()) and len(alone.state)
    return facts


def test_two_optimizers_with_groups_and_frozen_parameters_are_restored_and_load_in_plain_ones(
    tmp_path: Path, run_shared: Run
) -> None:
    facts = run_shared(2, _frozen_and_grouped, tmp_path)[0]
    assert facts["shards"] == facts["file"]
    same, same_too, weight_decay, parameters, with_state = facts["file"]
    assert same
    assert same_too
    assert weight_decay == 0.0
    assert with_state < parameters  # the frozen ones have none
    put = [number for group in facts["groups"] for number in group]
    assert len(set(put)) == parameters
    assert all(facts["shapes"][number] == shape for number, shape in facts["numbers"].items())
    assert len(facts["numbers"]) == facts["alone"] == with_state
