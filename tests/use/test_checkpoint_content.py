"""Checkpoints hold what was put in: compared with what was there before, or with one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

from lightning_mics import MiCSStrategy, full_state_dict
from tests.support.accelerators import plugin_of, prepared
from tests.support.accelerators import start as start_accelerator
from tests.support.fits import AdamModule, fit, refusal, same, whole_weights
from tests.support.loops import adam, network, set_up_in_two_calls, start, step
from tests.support.models import Block, OneBlock, TinyModule
from tests.support.trainers import cases_on_ranks, make_trainer, mics


class Tiny(TinyModule):
    """Has one block."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_values(state: dict[str, Any]) -> dict[str, Any]:
    return {name: whole(value) for name, value in state.items()}


@dataclass
class Held:
    """A tensor inside of an object."""

    tensor: Any


class Average(Callback):
    """Moving averages of the weights, and other sharded tensors, in nested containers and in an object."""

    def __init__(self, *, in_object: bool = False) -> None:
        self.in_object = in_object
        self.shadow: dict[str, Tensor] = {}
        self.loaded: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.shadow:
            self.shadow = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.loaded = {name: whole(value).clone() for name, value in self.shadow.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            self.shadow[name].mul_(0.5).add_(parameter.detach(), alpha=0.5)

    def state_dict(self) -> dict[str, Any]:
        first = next(iter(self.shadow.values()))
        state: dict[str, Any] = {"nested": [self.shadow, (first, 3)], "norm": first.norm()}
        return {**state, "held": Held(nn.Parameter(first))} if self.in_object else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["nested"][0]
        if self.in_object:
            self.shadow[next(iter(self.shadow))] = state["held"].tensor.detach()


def averages(folder: Path, kind: str) -> bool:
    in_object = kind.endswith("in objects")
    trained, resumed = Average(in_object=in_object), Average(in_object=in_object)
    options = {"async_save": True} if kind == "async" else {"state_dict_type": kind.split()[0]}
    trainer, _ = fit(folder, strategy=mics(partition_size=2, **options), callbacks=[trained])
    trainer.save_checkpoint(folder / kind)
    trainer.strategy.wait_for_checkpoints()
    saved = {name: whole(value).clone() for name, value in trained.shadow.items()}
    options = {"epochs": 2, "strategy": mics(partition_size=1), "callbacks": [resumed]}
    fit(folder, ckpt_path=folder / kind, weights_only=not in_object, **options)
    return same(saved, resumed.loaded)


def entries_of_fabric(folder: Path, kind: str) -> bool:
    fabric = start(state_dict_type=kind, devices=2, weights_only=False)
    model, optimizer = set_up_in_two_calls(fabric)
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = next(iter(shadow.values()))
    path = folder / f"entries {kind}"
    fabric.save(path, {"model": model, "optimizer": optimizer, "all": [shadow, {1: (first,)}], "held": Held(first)})
    fabric = start(devices=2, partition_size=1, weights_only=False)
    state = dict(zip(("model", "optimizer"), set_up_in_two_calls(fabric), strict=True), all=None, held=None)
    fabric.load(path, state)
    (loaded, others), held = state["all"], state["held"].tensor
    sharded = all(isinstance(value, DTensor) for value in (*loaded.values(), others[1][0], held))
    return sharded and same(whole_values(shadow), whole_values(loaded)) and same(whole(first), whole(held))


class Registered:
    """An object for Accelerate's ``register_for_checkpointing``."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.state = {"shadow": {name: p.detach() * factor for name, p in model.named_parameters()}, "count": factor}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def entries_of_accelerate(folder: Path, kind: str) -> bool:
    states = []
    for factor, partition_size in ((2.0, 2), (0.0, 1)):
        accelerator = start_accelerator(plugin={"partition_size": partition_size, "state_dict_type": kind})
        model, _optimizer = prepared(accelerator, adam)
        held = Registered(model, factor)
        accelerator.register_for_checkpointing(held)
        if factor:
            accelerator.save_state(str(folder / f"accelerate {kind}"))
            plugin_of(accelerator).save_checkpoint(accelerator, folder / f"plugin {kind}", shadow=held.state["shadow"])
        else:
            accelerator.load_state(str(folder / f"accelerate {kind}"))
            rest = plugin_of(accelerator).load_checkpoint(accelerator, folder / f"plugin {kind}")
            states.append(whole_values(rest["shadow"]))
        assert all(isinstance(value, DTensor) for value in held.state["shadow"].values())
        states.append(whole_values(held.state["shadow"]))
    return same(states[0], states[1]) and same(states[0], states[2])


class Renamed(AdamModule):
    """Has another name for its network, and renames what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.net
        del self.net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("net.", "body."): value for name, value in state.items()}
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.001
        self.norm = float(state["net.embed.weight"].norm())


def renamed_in_a_hook(folder: Path, kind: str) -> tuple[bool, bool, float]:
    trainer, saved = fit(folder, AdamModule, strategy=mics(state_dict_type=kind))
    trainer.save_checkpoint(folder / f"names {kind}")
    resumed, loaded = fit(folder, Renamed, ckpt_path=folder / f"names {kind}", epochs=2)
    weights = {name.replace("net.", "body."): value for name, value in saved.after_epoch[0].items()}
    norm = abs(resumed.lightning_module.norm - weights["body.embed.weight"].norm().item())
    return same(weights, loaded.started), same(saved.slots_after_epoch[0], loaded.slots), norm


def cut_epoch(folder: Path) -> tuple[int, int, int]:
    saving = ModelCheckpoint(dirpath=folder / "cut", save_last=True)
    fit(folder, AdamModule, epochs=-1, max_steps=1, callbacks=[saving])
    resumed, recorder = fit(folder, AdamModule, ckpt_path=folder / "cut" / "last.ckpt", epochs=-1, max_steps=4)
    return len(recorder.losses), resumed.global_step, resumed.current_epoch


class Stateless(SGD):
    """Does something at each step that does not scale with the learning rate."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise ValueError("no closure")
        self.calls += 1
        return super().step(closure)


class WithStateless(Tiny):
    def configure_optimizers(self) -> Any:
        return Stateless(self.parameters(), lr=0.1)


def steps_of_saves(folder: Path, kind: str) -> tuple[int, int, int]:
    trainer, _ = fit(folder, WithStateless, strategy=mics(state_dict_type=kind))
    trainer.save_checkpoint(folder / f"stateless {kind}")
    resumed, _ = fit(folder, WithStateless, ckpt_path=folder / f"stateless {kind}", epochs=2)
    return trainer.optimizers[0].calls, trainer.global_step, resumed.optimizers[0].calls


class Containers(SGD):
    """Keeps lists, tuples and dicts with numbers for keys, and a number per row."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.detach().abs().flatten(1).mean(1) if p.ndim > 1 else p.detach().clone()
                self.state[p].update(kept=[p.detach().clone(), (rows, 2)], of={0: p.detach() * 2}, rows=rows)
        return loss


class WithContainers(Tiny):
    def configure_optimizers(self) -> Any:
        return Containers(self.parameters(), lr=0.1)


def containers(folder: Path, kind: str) -> bool:
    trainer, _ = fit(folder, WithContainers, strategy=mics(partition_size=2, state_dict_type=kind))
    trainer.save_checkpoint(folder / f"containers {kind}")
    resumed, _ = fit(folder, WithContainers, ckpt_path=folder / f"containers {kind}", strategy=mics(partition_size=2))

    def states(of: pl.Trainer) -> list[Any]:
        (optimizer,) = of.strategy.optimizers
        slots = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        return [[whole(s["kept"][0]), whole(s["kept"][1][0]), whole(s["of"][0]), whole(s["rows"])] for s in slots]

    return same(states(trainer), states(resumed))


class Network(Tiny):
    """Takes a network, and keeps it among its hyper-parameters."""

    def __init__(self, net: nn.Module, scale: float = 1.0, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net


def network_in_hyperparameters(folder: Path) -> bool:
    trainer, _ = fit(folder, lambda: Network(network(), scale=3.0))
    trainer.save_checkpoint(folder / "network")
    loaded = Network.load_from_checkpoint(folder / "network", weights_only=False)
    return loaded.hparams.scale == 3.0 and same(whole_weights(trainer.lightning_module), whole_weights(loaded))


class Saves(Tiny):
    """Saves in the middle of a step, and notes what plain pickling says."""

    path: Path | None = None
    said: str = ""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.path is not None:
            self.trainer.save_checkpoint(self.path)
            self.whole = full_state_dict(self)
        return self.net(batch)

    def on_train_epoch_end(self) -> None:
        self.said = refusal(lambda: pickle.dumps(self.state_dict()))
        self.copied = isinstance(copy.copy(self.net.embed.weight), DTensor)


def saved_in_a_step(folder: Path) -> tuple[bool, bool, str, bool]:
    def make() -> Saves:
        module = Saves()
        module.path = folder / "in a step"
        return module

    with_saves, _ = fit(folder, make, strategy=mics(partition_size=2))
    without, _ = fit(folder, Saves, strategy=mics(partition_size=2))
    module = with_saves.lightning_module
    equal = same(whole_weights(module), whole_weights(without.lightning_module))
    shapes = all(value.shape == module.state_dict()[name].shape for name, value in module.whole.items())
    return equal, shapes, module.said, module.copied


class SavesFirst(Tiny):
    """Saves in ``setup``, before the strategy is set up."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def setup(self, stage: str) -> None:
        self.trainer.save_checkpoint(self.path)


def saved_before_the_fit(folder: Path, kind: str) -> bool:
    path = folder / f"before {kind}"
    strategy = mics(partition_size=2, state_dict_type=kind)
    first, _ = fit(folder, lambda: SavesFirst(path), strategy=strategy)
    resumed, _ = fit(folder, Tiny, strategy=mics(partition_size=2), ckpt_path=path)
    return same(whole_weights(first.lightning_module), whole_weights(resumed.lightning_module))


class Plain(Tiny):
    """Loads an unsharded state dict in a hook, and one of a block."""

    def on_fit_start(self) -> None:
        self.net.load_state_dict(network(seed=4).state_dict())
        torch.manual_seed(5)
        self.net.blocks[0].load_state_dict(Block(7).state_dict())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.0)


def plain_state_in_a_hook(folder: Path) -> bool:
    trainer, _ = fit(folder, Plain, strategy=mics(partition_size=2))
    expected = network(seed=4)
    torch.manual_seed(5)
    expected.blocks[0].load_state_dict(Block(7).state_dict())
    return same(whole_weights(trainer.lightning_module.net), dict(expected.state_dict()))


def by_key(folder: Path, kind: str) -> dict[str, Any]:
    fabric = start(state_dict_type=kind, devices=2)
    model, _ = set_up_in_two_calls(fabric)
    one, other = (fabric.setup_optimizers(AdamW(model.parameters(), lr=lr, foreach=True)) for lr in (0.05, 0.02))
    step(fabric, model, one)
    fabric.save(folder / f"keys {kind}", {"model": model, "a": one, "b": other})
    again, _ = set_up_in_two_calls(fabric)
    a, b = (fabric.setup_optimizers(AdamW(again.parameters(), lr=1.0, foreach=True)) for _ in range(2))
    fabric.load(folder / f"keys {kind}", {"model": again, "b": b, "a": a})
    facts = {"rates": [a.param_groups[0]["lr"], b.param_groups[0]["lr"]], "states": [len(a.state), len(b.state)]}
    fabric.load(folder / f"keys {kind}", {"model": again, "b": a})
    facts["one of two"] = a.param_groups[0]["lr"]
    fabric.save(folder / f"bare {kind}", {"model": model, "note": 1})
    facts["lacking"] = refusal(lambda: fabric.load(folder / f"bare {kind}", {"model": again, "optimizer": a}))
    second = fabric.setup_module(network(seed=7))
    fabric.save(folder / f"two {kind}", {"g": model, "d": second})
    fresh, last = (fabric.setup_module(network(seed=seed)) for seed in (8, 9))
    fabric.load(folder / f"two {kind}", {"d": last, "g": fresh})
    facts["two"] = same(whole_weights(last), whole_weights(second)) and same(whole_weights(fresh), whole_weights(model))
    fabric.save(folder / f"state {kind}", model.state_dict())
    facts["plain"] = isinstance(torch.load(folder / f"state {kind}", weights_only=True), dict)
    return facts


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("content")
    kinds = ("sharded", "full")
    cases: dict[Any, Callable[[], Any]] = {("averages", kind): partial(averages, folder, kind) for kind in kinds}
    for kind in ("async", "sharded in objects", "full in objects"):
        cases["averages", kind] = partial(averages, folder, kind)
    cases["cut"] = partial(cut_epoch, folder)
    for kind in kinds:
        cases["fabric", kind] = partial(entries_of_fabric, folder, kind)
        cases["accelerate", kind] = partial(entries_of_accelerate, folder, kind)
        cases["renamed", kind] = partial(renamed_in_a_hook, folder, kind)
        cases["steps", kind] = partial(steps_of_saves, folder, kind)
        cases["containers", kind] = partial(containers, folder, kind)
        cases["before", kind] = partial(saved_before_the_fit, folder, kind)
        cases["keys", kind] = partial(by_key, folder, kind)
    cases["network"] = partial(network_in_hyperparameters, folder)
    cases["in a step"] = partial(saved_in_a_step, folder)
    cases["plain state"] = partial(plain_state_in_a_hook, folder)
    return cases_on_ranks(cases, world_size=2)


@pytest.mark.parametrize("kind", ["sharded", "full", "async", "sharded in objects", "full in objects"])
def test_sharded_tensors_of_a_callback_come_back_whole_and_go_on(seen: Any, kind: str) -> None:
    assert seen["averages", kind] == [True, True]


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("host", ["fabric", "accelerate"])
def test_sharded_entries_of_fabric_and_accelerate_come_back_whole(seen: Any, host: str, kind: str) -> None:
    assert seen[host, kind] == [True, True]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_hook_may_rename_and_change_all_that_is_loaded(seen: Any, kind: str) -> None:
    for weights, slots, norm in seen["renamed", kind]:
        assert weights and slots
        assert norm == pytest.approx(0, abs=1e-5)


def test_a_resumed_run_goes_on_in_an_epoch_that_was_cut(seen: Any) -> None:
    assert seen["cut"] == [(3, 4, 2)] * 2  # steps after resuming, steps and epochs in all, as in one process


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_neither_saving_nor_loading_steps_an_optimizer(seen: Any, kind: str) -> None:
    for calls, steps, after_resuming in seen["steps", kind]:
        assert calls == steps == after_resuming == 2


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_lists_tuples_and_numbered_dicts_of_an_optimizer_come_back(seen: Any, kind: str) -> None:
    assert seen["containers", kind] == [True, True]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_optimizers_of_fabric_are_restored_by_their_keys(seen: Any, kind: str) -> None:
    for facts in seen["keys", kind]:
        assert facts["rates"] == [0.05, 0.02]
        assert facts["states"][0] > 0 == facts["states"][1]
        assert facts["one of two"] == 0.02
        assert facts["lacking"].startswith("KeyError") and "has no 'optimizer'" in facts["lacking"]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fabric_saves_several_models_and_bare_state_dicts(seen: Any, kind: str) -> None:
    for facts in seen["keys", kind]:
        assert facts["two"]
        assert facts["plain"]


def test_a_network_in_hyperparameters_is_saved_as_it_was_before_sharding(seen: Any) -> None:
    assert seen["network"] == [True, True]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_saved_before_the_fit_has_the_initial_weights(kind: str, seen: dict[Any, list[Any]]) -> None:
    assert all(seen["before", kind])


def test_saving_in_the_middle_of_a_step_changes_nothing_and_full_state_dict_is_whole(seen: Any) -> None:
    for equal, shapes, said, copied in seen["in a step"]:
        assert equal and shapes and copied
        assert said.startswith("RuntimeError: a tensor of shape") and "full_state_dict" in said


def test_plain_state_dicts_load_in_hooks_and_into_blocks(seen: Any) -> None:
    assert seen["plain state"] == [True, True]


def test_strategies_and_trainers_that_have_not_run_can_be_copied(tmp_path: Path) -> None:
    assert isinstance(pickle.loads(pickle.dumps(MiCSStrategy())), MiCSStrategy)
    assert isinstance(copy.deepcopy(make_trainer(tmp_path)).strategy, MiCSStrategy)
