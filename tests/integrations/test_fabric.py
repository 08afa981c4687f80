"""``Fabric(strategy="mics")``: setting up, steps, evaluation, clipping, checkpoints, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from lightning_mics import MiCSFabricStrategy
from lightning_mics.checkpoint.errors import UnsafeCheckpointError
from tests.support.forked import RankError
from tests.support.loops import adam, alone, assert_same, network, sgd, start, step, two_batches_then_one, weights
from tests.support.models import TinyLM, TinyModule, tokens
from tests.support.networks import GPT
from tests.support.recorded import RecordCollectives
from tests.support.trainers import loader, make_trainer, mics, on_ranks

# -- setting up --------------------------------------------------------------------------------------------------------


def set_up_in_one_call(fabric: Fabric) -> Any:
    model = network()
    return fabric.setup(model, sgd(model))


def set_up_in_two_calls(fabric: Fabric) -> Any:
    model = fabric.setup_module(network())
    return model, fabric.setup_optimizers(sgd(model))


def set_up_on_meta(fabric: Fabric) -> Any:
    with fabric.init_module(empty_init=True):
        model = TinyLM()
    assert all(parameter.is_meta for parameter in model.parameters())
    model, optimizer = fabric.setup(model, sgd(model))
    fabric.load_raw(Path("raw.pt"), model)
    return model, optimizer


def train_after(set_up: Callable[[Fabric], Any], folder: Path) -> dict[str, Tensor]:
    os.chdir(folder)
    fabric = start()
    if fabric.global_rank == 0:
        torch.save(network().state_dict(), "raw.pt")
    fabric.barrier()
    model, optimizer = set_up(fabric)
    for index in range(2):
        step(fabric, model, optimizer, seed=index)
    return weights(model)


@pytest.mark.parametrize("set_up", [set_up_in_one_call, set_up_in_two_calls, set_up_on_meta])
def test_however_it_is_set_up_it_trains_as_one_process(set_up: Callable[[Fabric], Any], tmp_path: Path) -> None:
    for trained in on_ranks(train_after, set_up, tmp_path):
        assert_same(trained, alone(steps=2), 1e-6)


def set_up_a_scheduler_and_groups() -> list[float]:
    fabric = start()
    model = network()
    groups = [{"params": model.blocks.parameters(), "lr": 0.5}, {"params": model.norm.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
    before = weights(model)
    step(fabric, model, optimizer)
    scheduler.step()
    changed = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert changed == {name for name, _ in network().named_parameters() if name.split(".")[0] in ("blocks", "norm")}
    return [group["lr"] for group in optimizer.param_groups]


def test_groups_and_schedulers_of_an_optimizer_stay() -> None:
    assert on_ranks(set_up_a_scheduler_and_groups) == [[0.25, 0.05]] * 4


def by_name() -> tuple[str, int, dict[str, int]]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy="mics")
    fabric.launch()
    data = fabric.setup_dataloaders(DataLoader(list(range(8)), batch_size=1))
    seen = [int(value) for value in data]
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, seen)
    assert sorted(value for of_rank in gathered for value in of_rank) == list(
        range(8)
    )  # every rank has data of its own
    return type(fabric.strategy).__name__, len(seen), fabric.strategy.distributed_sampler_kwargs


def test_the_name_is_registered_and_each_rank_has_its_own_data() -> None:
    for rank, said in enumerate(on_ranks(by_name)):
        assert said == ("MiCSFabricStrategy", 2, {"num_replicas": 4, "rank": rank})


def compiled() -> dict[str, Tensor]:
    fabric = start()
    model = torch.compile(network(), backend="aot_eager")
    model, optimizer = fabric.setup(model, sgd(model))
    step(fabric, model, optimizer)
    return weights(getattr(model, "_orig_mod", model))


def test_a_compiled_model_is_compiled_again() -> None:
    for trained in on_ranks(compiled):
        assert_same({name.removeprefix("_orig_mod."): value for name, value in trained.items()}, alone(), 1e-6)


def parts_of_ranks(move: bool) -> tuple[float, str, list[Any]]:
    fabric = start(activation_checkpointing=True)
    model = network()
    with RecordCollectives() as recorded:
        model, optimizer = fabric.setup(model, sgd(model), move_to_device=move)
    step(fabric, model, optimizer)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    gathers = [one for one in recorded.of("all_gather") if one.dtype.is_floating_point]
    return held / sum(p.numel() for p in model.parameters()), str(model.device), gathers


@pytest.mark.parametrize("move", [True, False])
def test_each_rank_holds_its_shards_and_setup_gathers_nothing(move: bool) -> None:
    for share, device, gathers in on_ranks(parts_of_ranks, move):
        assert share == pytest.approx(0.5, abs=0.06)  # rows of awkward shapes are uneven
        assert device == "cpu" and gathers == []


def too_early_and_too_much() -> list[str]:
    strategy = MiCSFabricStrategy()
    said = []
    for ask in (
        lambda: strategy.device_mesh,
        lambda: strategy.checkpoint_io,
        lambda: setattr(strategy, "checkpoint_io", None),
        lambda: strategy.save_checkpoint("c", {}, storage_options={}),
    ):
        try:
            ask()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            said.append(type(error).__name__)
    return said


def test_calls_before_launch_and_options_of_other_strategies_are_rejected() -> None:
    assert too_early_and_too_much() == ["RuntimeError", "NotImplementedError", "NotImplementedError", "TypeError"]


# -- steps -------------------------------------------------------------------------------------------------------------


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


def test_no_backward_sync_accumulates_until_the_boundary_and_ends_after_it() -> None:
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

    for trained in on_ranks(accumulate, [True, True, False]):
        assert_same(trained, accumulated(), 1e-6)


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


@pytest.mark.parametrize("options", [{}, {"partition_size": 4, "accumulate_gradients": "shard"}])
def test_backwards_may_come_after_several_forwards(options: dict[str, Any]) -> None:
    for trained in on_ranks(several_forwards_first, options):
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
def test_zero_grad_starts_a_window_over(how: str) -> None:
    for trained in on_ranks(start_over, how):
        assert_same(trained, two_batches_then_one(), 1e-6)


def step_without_a_boundary() -> str:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    with fabric.no_backward_sync(model):
        fabric.backward(model(tokens(2)))
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_a_step_without_a_boundary_is_rejected() -> None:
    for said in on_ranks(step_without_a_boundary):
        assert said.startswith("the root, blocks.0")
        assert said.endswith(
            "run the last backward of a window as its boundary, outside of `no_backward_sync` or `no_sync`"
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


def test_one_model_may_accumulate_while_another_steps() -> None:
    for trained in on_ranks(accumulate_one_beside_another):
        assert_same(trained, two_batches_then_one(), 1e-6)


def backward_by_hand() -> None:
    fabric = start()
    model, _ = set_up_in_one_call(fabric)
    model(tokens(2)).backward()


def test_a_backward_that_fabric_does_not_see_is_rejected() -> None:
    with pytest.raises(RankError, match=r"fabric\.backward"):
        on_ranks(backward_by_hand)


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
def test_evaluation_in_any_mode_leaves_a_model_that_trains(mode: Callable[[], Any]) -> None:
    for trained in on_ranks(evaluate_then_train, mode):
        assert_same(trained, alone(steps=2), 1e-6)


def clip(arguments: dict[str, float]) -> tuple[Any, dict[str, Tensor]]:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    fabric.backward(model(tokens(2, seed=fabric.global_rank)))
    norm = fabric.clip_gradients(model, optimizer, **arguments)
    optimizer.step()
    return norm, weights(model)


def test_gradients_are_clipped_by_their_norm_over_all_shards() -> None:
    norms: list[Tensor] = []
    expected = alone(change=lambda model: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
    for norm, clipped in on_ranks(clip, {"max_norm": 0.01}):
        assert type(norm) is Tensor
        torch.testing.assert_close(norm, norms[0], rtol=0, atol=1e-6)
        assert_same(clipped, expected, 1e-6)


def test_gradients_are_clipped_by_value() -> None:
    expected = alone(change=lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3))
    for norm, clipped in on_ranks(clip, {"clip_val": 1e-3}):
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
def test_precision_is_as_in_fabric(precision: str, parameters: torch.dtype) -> None:
    for stored, computed in on_ranks(precisions, precision):
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


def test_two_models_train_side_by_side() -> None:
    for one, two in on_ranks(train_two_models):
        assert_same(one, alone(), 1e-6)
        assert not two["norm.weight"].equal(one["norm.weight"])


def values_of_all_ranks() -> list[float]:
    fabric = start()
    value = torch.tensor(float(fabric.global_rank))
    return [float(fabric.all_reduce(value.clone(), reduce_op=op)) for op in ("mean", "sum", "max")]


def test_values_are_reduced_over_all_ranks() -> None:
    assert on_ranks(values_of_all_ranks) == [[1.5, 6.0, 3.0]] * 4


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Counter:
    """Has a state."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def save(path: Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = start(**options)
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 1, "counter": Counter(7), "nested": {"lr": [0.1]}}
    fabric.save(path, state)
    fabric.strategy.wait_for_checkpoints()
    saved = weights(model)
    step(fabric, model, optimizer, seed=1)
    return saved, weights(model)


def load(path: Path, devices: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = start(devices=devices, **options)
    model = network(seed=5)
    model, optimizer = fabric.setup(model, adam(model))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "counter": Counter(0)}
    remainder = fabric.load(path, state)
    assert state["step"] == 1 and state["counter"].count == 7
    assert remainder == {"nested": {"lr": [0.1]}}  # and nothing of our own
    loaded = weights(model)
    if devices == 4:
        step(fabric, model, optimizer, seed=1)
    return loaded, weights(model)


@pytest.mark.parametrize(
    ("saving", "devices", "loading"),
    [
        ({}, 4, {}),
        ({}, 4, {"partition_size": 4}),
        ({"partition_size": 4}, 2, {}),
        ({"state_dict_type": "full"}, 4, {"partition_size": 1}),
        ({"async_save": True}, 4, {}),
    ],
)
def test_training_resumes_from_a_checkpoint(
    saving: dict[str, Any], devices: int, loading: dict[str, Any], tmp_path: Path
) -> None:
    saved, went_on = on_ranks(save, tmp_path / "c", saving)[0]
    for loaded, then in on_ranks(load, tmp_path / "c", devices, loading, world_size=devices):
        assert_same(loaded, saved)
        if devices == 4:
            assert_same(then, went_on, 1e-6)


def load_what_is_not_there(path: Path) -> tuple[str, Any]:
    fabric = start()
    model, _ = set_up_in_two_calls(fabric)
    fabric.save(path, {"model": model})
    state = {"model": model, "epoch": 3}
    with pytest.raises(KeyError) as error:
        fabric.load(path, state)
    fabric.load(path, state, strict=False)
    other = fabric.setup_module(network(layers=2))
    with pytest.raises(RuntimeError, match="the checkpoint and the model differ"):
        fabric.load(path, {"model": other})
    return str(error.value), state["epoch"]


def test_what_a_checkpoint_lacks_is_named_unless_that_is_allowed(tmp_path: Path) -> None:
    for message, epoch in on_ranks(load_what_is_not_there, tmp_path / "c"):
        assert "has no 'epoch'; load with strict=False" in message
        assert epoch == 3


def save_filtered(path: Path) -> None:
    fabric = start(state_dict_type="full")
    model, _ = set_up_in_one_call(fabric)
    fabric.save(path, {"model": model, "epoch": 2}, filter={"model": lambda name, _: "bias" not in name})


def test_a_full_file_can_be_filtered(tmp_path: Path) -> None:
    on_ranks(save_filtered, tmp_path / "c.pt")
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert content["epoch"] == 2
    assert content["model"].keys() == {name for name in network().state_dict() if "bias" not in name}


def refused(case: str, path: Path) -> str:
    fabric = start()
    model, optimizer = set_up_in_one_call(fabric)
    plain = network()
    cases: dict[str, Callable[[], Any]] = {
        "filter of shards": lambda: fabric.save(path, {"model": model}, filter={"model": lambda *_: True}),
        "no model": lambda: fabric.save(path, {"optimizer": optimizer}),
        "a plain model": lambda: fabric.load(path, {"model": plain}),
        "two models": lambda: fabric.save(path, {"a": model, "b": fabric.setup_module(plain)}),
        "nothing": lambda: fabric.load(path),
        "optimizer alone": lambda: fabric.load_raw(path, optimizer),
        "no checkpoint": lambda: fabric.load(path, {"model": model}),
        "set up twice": lambda: fabric.setup_module(model),
        "a sharded model again, otherwise": lambda: start(partition_size=4).setup_module(model._forward_module),
        "an optimizer of others": lambda: fabric.setup(plain, sgd(network())),
        "an optimizer made too early": lambda: fabric.setup_optimizers(sgd(plain)),
        "no blocks": lambda: fabric.setup_module(nn.Linear(2, 2)),
    }
    if case == "an optimizer that has stepped":
        stepped = adam(plain)
        plain(tokens(2)).backward()
        stepped.step()
        cases[case] = lambda: fabric.setup(plain, stepped)
    try:
        cases[case]()
    except (KeyError, NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("filter of shards", "NotImplementedError: a sharded checkpoint is always complete"),
        ("no model", r"ValueError: fabric.save takes a model that was set up.*it got none"),
        ("a plain model", r"ValueError: fabric.load takes a model that was set up.*it got none"),
        ("two models", r"ValueError: fabric.save takes .* it got \['a', 'b'\]"),
        ("nothing", "ValueError: fabric.load takes a model"),
        ("optimizer alone", "NotImplementedError: an optimizer is loaded with its model"),
        ("no checkpoint", "ValueError: .* does not point to a valid checkpoint"),
        ("set up twice", "ValueError: A model should be passed only once"),
        ("a sharded model again, otherwise", "ValueError: the model is already sharded with partition_size=2"),
        ("an optimizer of others", "ValueError: SGD holds 15 tensors that are not parameters of the model"),
        ("an optimizer made too early", r"ValueError: SGD holds 15 tensors .* make it after `model = fabric"),
        ("an optimizer that has stepped", "ValueError: AdamW has stepped"),
        ("no blocks", "TypeError: "),
    ],
)
def test_wrong_use_gets_a_clear_error(case: str, message: str, tmp_path: Path) -> None:
    for said in on_ranks(refused, case, tmp_path / "c"):
        assert re.match(message, said), said


@pytest.mark.parametrize("precision", ["16-mixed", "64-true", "16-true"])
def test_unsupported_precisions_are_rejected_before_communication(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"does not support .*precision='{precision}'"):
        Fabric(accelerator="cpu", devices=2, strategy="mics", precision=precision)


def test_invalid_options_are_rejected_by_the_constructor() -> None:
    with pytest.raises(TypeError, match="partition_sise"):
        MiCSFabricStrategy(partition_sise=2)
    with pytest.raises(ValueError, match='async_save=True needs state_dict_type="sharded"'):
        MiCSFabricStrategy(async_save=True, state_dict_type="full")
    with pytest.raises(ValueError, match='state_dict_type=False is neither "sharded" nor "full"'):
        MiCSFabricStrategy(state_dict_type=False)


def too_large_a_partition() -> None:
    start(partition_size=3)


def test_a_partition_size_that_does_not_fit_is_rejected() -> None:
    with pytest.raises(RankError, match="partition_size=3"):
        on_ranks(too_large_a_partition)


def on_one_device() -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    return fabric, model, optimizer


def save_a_full_file(path: Path) -> dict[str, Tensor]:
    fabric = start(state_dict_type="full")
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    fabric.save(path, {"net": model, "adam": optimizer, "step": 1})
    return weights(model)


def load_a_full_file(path: Path) -> tuple[dict[str, Tensor], int, float]:
    fabric = start()
    model = network(seed=5)
    model, optimizer = fabric.setup(model, adam(model))
    state = {"net": model, "adam": optimizer, "step": 0}
    assert fabric.load(path, state) == {}
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    return weights(model), state["step"], float(moments.full_tensor().abs().sum())


def test_full_files_load_in_fabric_on_one_device_and_back(tmp_path: Path) -> None:
    saved = on_ranks(save_a_full_file, tmp_path / "four.pt")[0]
    fabric, model, optimizer = on_one_device()
    state = {"net": model, "adam": optimizer, "step": 0}
    fabric.load(tmp_path / "four.pt", state)
    assert_same(weights(model), saved)
    step(fabric, model, optimizer)
    fabric.save(tmp_path / "one.pt", {**state, "step": 2})
    moments = float(optimizer.state_dict()["state"][0]["exp_avg"].abs().sum())
    for loaded, steps, of_moments in on_ranks(load_a_full_file, tmp_path / "one.pt"):
        assert_same(loaded, weights(model))
        assert steps == 2 and of_moments == pytest.approx(moments)


def save_and_load_in_a_store(folder: Path) -> None:
    fabric = start()
    model = network()
    model, optimizer = fabric.setup(model, adam(model))
    step(fabric, model, optimizer)
    saved, url = weights(model), f"local://{folder}/sharded"
    fabric.save(url, {"model": model, "optimizer": optimizer, "kind": re.compile("a")})
    step(fabric, model, optimizer, seed=1)
    with pytest.raises(UnsafeCheckpointError):
        fabric.load(url, {"model": model, "optimizer": optimizer})
    remainder = fabric.load(url, {"model": model, "optimizer": optimizer}, weights_only=False)
    assert remainder == {"kind": re.compile("a")}
    assert_same(weights(model), saved)
    trusting = start(weights_only=False)
    other = network()
    other, other_optimizer = trusting.setup(other, adam(other))
    assert trusting.load(url, {"model": other, "optimizer": other_optimizer}) == remainder
    with pytest.raises(UnsafeCheckpointError):
        trusting.load(url, {"model": other, "optimizer": other_optimizer}, weights_only=True)
    if fabric.global_rank == 0:
        torch.save(network(seed=7).state_dict(), folder / "raw.pt")
    fabric.barrier()
    fabric.load_raw(f"local://{folder}/raw.pt", model)
    assert_same(weights(model), dict(network(seed=7).state_dict()))


@pytest.mark.filterwarnings("ignore:.*trust:UserWarning")
def test_checkpoints_in_a_store_and_objects_that_must_be_trusted(tmp_path: Path) -> None:
    on_ranks(save_and_load_in_a_store, tmp_path)


def load_raw_files(folder: Path) -> list[str]:
    fabric = start()
    model, _ = set_up_in_one_call(fabric)
    said = []
    for name in ("lacking.pt", "list.pt", "not there.pt"):
        try:
            fabric.load_raw(folder / name, model)
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    fabric.load_raw(folder / "lacking.pt", model, strict=False)
    plain = network(seed=5)
    fabric.load_raw(folder / "whole.pt", plain)  # a module that was not set up
    assert_same(weights(plain), dict(network().state_dict()))
    return said


def test_raw_files_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    whole = network().state_dict()
    torch.save(whole, tmp_path / "whole.pt")
    torch.save({name: value for name, value in whole.items() if name != "norm.bias"}, tmp_path / "lacking.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for lacking, no_dictionary, not_there in on_ranks(load_raw_files, tmp_path):
        assert "1 names are missing in the checkpoint ['norm.bias']" in lacking
        assert "holds list, no state_dict" in no_dictionary
        assert "is neither a file with a state_dict nor a sharded checkpoint" in not_there


# -- the Trainer's checkpoints, and the other way round ----------------------------------------------------------------


def fit(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    trainer = make_trainer(folder, strategy=mics(partition_size=4, **options), max_steps=2)
    model = TinyModule()
    trainer.fit(model, loader())
    trainer.save_checkpoint(folder / "trainer.ckpt")
    return weights(model)


def load_the_trainers(path: Path) -> tuple[dict[str, Tensor], int]:
    fabric = start()
    model = TinyModule()
    model, optimizer = fabric.setup(model, sgd(model))
    remainder = fabric.load(path, {"model": model, "optimizer": optimizer})
    raw = fabric.setup_module(TinyModule())
    if path.is_dir():
        fabric.load_raw(path, raw)
        assert_same(weights(raw), weights(model))
    return weights(model), remainder["global_step"]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fabric_loads_the_trainers_checkpoint(kind: str, tmp_path: Path) -> None:
    saved = on_ranks(fit, tmp_path, {"state_dict_type": kind})[0]
    for loaded, steps in on_ranks(load_the_trainers, tmp_path / "trainer.ckpt"):
        assert_same(loaded, saved)
        assert steps == 2


def save_for_the_trainer(path: Path) -> dict[str, Tensor]:
    fabric = start()
    model = TinyModule()
    model, optimizer = fabric.setup(model, sgd(model))
    loss = model(tokens(2))
    fabric.backward(loss)
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return weights(model)


class AsLoaded(TinyModule):
    """Keeps the weights that it begins with."""

    def on_train_start(self) -> None:
        self.first = weights(self)


def fit_from(folder: Path) -> tuple[dict[str, Tensor], int]:
    trainer = make_trainer(folder, strategy=mics(partition_size=4), max_steps=2)
    model = AsLoaded()
    trainer.fit(model, loader(), ckpt_path=folder / "fabric.ckpt")
    return model.first, trainer.global_step


def test_the_trainer_starts_from_fabrics_checkpoint(tmp_path: Path) -> None:
    saved = on_ranks(save_for_the_trainer, tmp_path / "fabric.ckpt")[0]
    for first, steps in on_ranks(fit_from, tmp_path):
        assert_same(first, saved)
        assert steps == 2


# -- launching ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from lightning.fabric import Fabric
import lightning_mics
from tests.models import TinyLM, tokens

fabric = Fabric({arguments})
fabric.launch() if {launches} else None
model = TinyLM()
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
fabric.backward(model(tokens(2)))
optimizer.step()
print(f"rank {{fabric.global_rank}} of {{fabric.world_size}}: {{type(fabric.strategy).__name__}}", flush=True)
"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ([], 'accelerator="cpu", devices=2, strategy="mics"'),
        (["-m", "lightning_mics", "run", "--strategy=mics", "--accelerator=cpu", "--devices=2"], ""),
    ],
    ids=["launch", "command line"],
)
def test_ranks_are_launched(command: list[str], arguments: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(arguments=arguments, launches=not command))
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_"))}
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        env={**environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank} of 2: MiCSFabricStrategy" in done.stdout
