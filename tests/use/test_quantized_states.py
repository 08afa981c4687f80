"""Optimizers of torchao that keep their states in 8 bits, 4 bits or float8: training, saving and resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_mics.checkpoint.content import quantized, state_record
from lightning_mics.checkpoint.inspect import main as inspect
from lightning_mics.checkpoint.opening import open_checkpoint
from lightning_mics.policy.memory import saved_by_low_bits
from tests.support.accelerators import start as start_accelerator
from tests.support.accelerators import step as step_of_accelerate
from tests.support.campaign import campaign
from tests.support.fits import data, refusal, whole_weights
from tests.support.loops import network, start, step, weights
from tests.support.quantizing import (
    DIM,
    KINDS,
    ODD,
    WideLM,
    WideModule,
    inner_of,
    is_quantized,
    quantizing,
    states_of,
    steps_of,
    uncompiled,
    values_of,
)
from tests.support.trainers import cases_on_ranks, make_trainer, mics, on_ranks

torchao = pytest.importorskip("torchao")

BEFORE, AFTER = 3, 3  # steps before and after a checkpoint
SIZES = (1, 2, 4)
KEYS = [(kind, size) for kind in KINDS for size in SIZES]
OTHER_SIZES, OTHER_SIZES_IN_CAMPAIGN = [(1, 4)], [(2, 1), (4, 2)]  # saved, and loaded


def set_up(kind: str, size: int, *, seed: int = 1, devices: int = 4, **options: Any) -> Any:
    fabric = start(partition_size=size, devices=devices, **options)
    model = network(seed, kind=WideLM)
    return fabric, *fabric.setup(model, quantizing(model, kind))


def train(fabric: Any, model: Any, optimizer: Any, *, first: int, count: int) -> list[float]:
    return [step(fabric, model, optimizer, seed=seed) for seed in range(first, first + count)]


def saved(folder: Path, kind: str, size: int, **options: Any) -> dict[str, Any]:
    """Train, save, and train on; what there was then."""
    with uncompiled():
        fabric, model, optimizer = set_up(kind, size, **options)
        train(fabric, model, optimizer, first=0, count=BEFORE)
        fabric.save(folder / f"{kind} {size}", {"model": model, "optimizer": optimizer})
        found = {"inner": inner_of(optimizer), "values": values_of(optimizer)}
        found["quantized"] = [is_quantized(value) for value in states_of(optimizer)]
        losses = train(fabric, model, optimizer, first=BEFORE, count=AFTER)
        return {**found, "losses": losses, "weights": weights(model)}


def resumed(folder: Path, name: str, kind: str, size: int, *, devices: int = 4) -> dict[str, Any]:
    """Load, and train on; what there was then."""
    with uncompiled():
        fabric, model, optimizer = set_up(kind, size, seed=5, devices=devices)
        fabric.load(folder / name, {"model": model, "optimizer": optimizer})
        found = {"inner": inner_of(optimizer), "values": values_of(optimizer), "steps": steps_of(optimizer)}
        losses = train(fabric, model, optimizer, first=BEFORE, count=AFTER)
        return {**found, "losses": losses, "weights": weights(model)}


def values_alone(folder: Path, name: str, kind: str, size: int) -> dict[str, Any]:
    """The same, as if the checkpoint had values and no codes."""
    with patch.object(quantized, "restore_inner", lambda *_: False):
        return resumed(folder, name, kind, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quantized")
    (made / "full").mkdir()
    return made


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Any, list[dict[str, Any]]]:
    return cases_on_ranks({key: partial(saved, folder, *key) for key in KEYS})


@pytest.fixture(scope="module")
def on_same(folder: Path, trained: Any) -> dict[Any, list[dict[str, Any]]]:
    return cases_on_ranks({key: partial(resumed, folder, f"{key[0]} {key[1]}", *key) for key in KEYS})


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("kind", "size"), KEYS)
def test_resumed_on_the_same_layout_states_losses_and_weights_are_the_same_bit_for_bit(
    trained: Any, on_same: Any, kind: str, size: int
) -> None:
    for before, after in zip(trained[kind, size], on_same[kind, size], strict=True):
        assert any(before["quantized"]) and not all(before["quantized"])
        assert equal(before["inner"], after["inner"])
        assert before["losses"] == after["losses"]
        assert equal(list(before["weights"].values()), list(after["weights"].values()))


def test_some_shards_of_a_tensor_are_quantized_and_others_are_not(trained: Any) -> None:
    first, *_, last = (each["quantized"] for each in trained["AdamW8bit", 4])
    assert any(one and not other for one, other in zip(first, last, strict=True))
    first, last = (each["quantized"] for each in trained["AdamW8bit", 2][:2])
    assert any(other and not one for one, other in zip(first, last, strict=True))


@pytest.fixture(scope="module")
def on_others(folder: Path, trained: Any, in_campaign: bool) -> dict[Any, list[dict[str, Any]]]:
    """By kind, saved size, loaded size: more shards, fewer shards, and as many without their codes."""
    cases = {
        (kind, one, other): partial(resumed, folder, f"{kind} {one}", kind, other)
        for kind in KINDS
        for one, other in [*OTHER_SIZES, *(OTHER_SIZES_IN_CAMPAIGN if in_campaign else ())]
    }
    without = {(kind, 2, "values"): partial(values_alone, folder, f"{kind} 2", kind, 2) for kind in KINDS}
    return cases_on_ranks({**cases, **without})


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path, trained: Any) -> dict[Any, list[dict[str, Any]]]:
    """Partition groups of two ranks, as on four: one replica, and as many shards."""
    cases = {kind: partial(resumed, folder, f"{kind} 2", kind, 2, devices=2) for kind in KINDS}
    return cases_on_ranks(cases, world_size=2)


def gap_in_steps(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The largest difference of loaded and saved values, in steps between neighboring codes."""
    largest = 0.0
    for saved_values, loaded, steps in zip(before["values"], after["values"], after["steps"], strict=True):
        gap = (loaded - saved_values).abs()
        assert torch.equal(gap[steps == 0], torch.zeros_like(gap[steps == 0]))  # kept in float32
        largest = max(largest, float((gap / steps)[steps > 0].max()) if (steps > 0).any() else 0.0)
    return largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [*OTHER_SIZES, (2, "values"), *map(campaign, OTHER_SIZES_IN_CAMPAIGN)])
def test_resumed_on_another_layout_states_differ_by_less_than_a_quantization_step(
    trained: Any, on_others: Any, kind: str, sizes: tuple[Any, Any]
) -> None:
    before, after = trained[kind, sizes[0]][0], on_others[(kind, *sizes)][0]
    assert gap_in_steps(before, after) < 1
    assert before["losses"] == pytest.approx(after["losses"], rel=0.01)


def test_values_alone_would_not_give_the_same_codes(trained: Any, on_others: Any) -> None:
    assert not equal(trained["AdamW8bit", 2][1]["inner"], on_others["AdamW8bit", 2, "values"][1]["inner"])
    assert gap_in_steps(trained["AdamW8bit", 2][0], on_others["AdamW8bit", 2, "values"][0]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_replicas_is_the_same_layout_of_shards(trained: Any, on_two_ranks: Any, kind: str) -> None:
    for before, after in zip(trained[kind, 2][:2], on_two_ranks[kind], strict=True):
        assert equal(before["inner"], after["inner"])


def without_codes(folder: Path) -> dict[str, Any]:
    """A checkpoint of an earlier version, with values alone, and what is loaded from it."""
    with patch.object(state_record, "inner_bytes", lambda _: {}):
        before = saved(folder / "earlier", KINDS[0], 2)
    return {"before": before, "after": resumed(folder / "earlier", f"{KINDS[0]} 2", KINDS[0], 2)}


def from_full_file(folder: Path, kind: str) -> dict[str, Any]:
    """The same for one file."""
    before = saved(folder / "full", kind, 2, state_dict_type="full")
    return {"before": before, "after": resumed(folder / "full", f"{kind} 2", kind, 2)}


class Losses(Callback):
    """The loss of each step on this rank."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fitted(folder: Path, kind: str, size: int, *, epochs: int, ckpt_path: Any = None, **options: Any) -> Any:
    """A Trainer that has fitted, and what there is at its end: the losses of the last epoch, weights and states."""
    torch.manual_seed(0 if ckpt_path is None else 1)
    seen, module = Losses(), WideModule(kind)
    strategy = mics(partition_size=size, **options)
    trainer = make_trainer(
        folder,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[seen],
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    found = {"losses": seen.losses[-2:], "weights": whole_weights(module), "inner": inner_of(trainer.optimizers[0])}
    return trainer, found


def under_the_trainer(folder: Path, kind: str, size: int) -> dict[str, Any]:
    """A fit of two epochs, and its second epoch resumed from the checkpoint of the first, saved asynchronously."""
    path = folder / f"trainer {kind} {size}.ckpt"
    with uncompiled():
        trainer, _ = fitted(folder, kind, size, epochs=1, async_save=True)
        trainer.save_checkpoint(path)
        trainer.strategy.wait_for_checkpoints()
        _, before = fitted(folder, kind, size, epochs=2)
        _, after = fitted(folder, kind, size, epochs=2, ckpt_path=path)
    return {"before": before, "after": after}


def under_accelerate(folder: Path, kind: str, size: int) -> dict[str, Any]:
    """Steps after ``save_state``, and the same after ``load_state``."""
    found = {}
    with uncompiled():
        for name, seed in (("before", 1), ("after", 5)):
            accelerator = start_accelerator(plugin={"partition_size": size})
            model = network(seed, kind=WideLM)
            model, optimizer = accelerator.prepare(model, quantizing(model, kind))
            if name == "before":
                steps_of_accelerate(accelerator, model, optimizer, first=0, count=BEFORE)
                accelerator.save_state(str(folder / f"accelerate {kind} {size}"))
            else:
                accelerator.load_state(str(folder / f"accelerate {kind} {size}"))
            at_first = inner_of(optimizer)
            steps_of_accelerate(accelerator, model, optimizer, first=BEFORE, count=AFTER)
            found[name] = {"inner": [*at_first, *inner_of(optimizer)], "weights": weights(model), "losses": []}
    return found


def steps_of_accelerate(accelerator: Any, model: Any, optimizer: Any, *, first: int, count: int) -> None:
    for seed in range(first, first + count):
        step_of_accelerate(accelerator, model, optimizer, seed=seed)


HOSTS = {"Trainer, saved asynchronously": under_the_trainer, "Accelerate": under_accelerate}
HOST_KEYS = [(host, kind, size) for host in HOSTS for kind, size in zip(KINDS, (2, 1, 4), strict=True)]
HOST_KEYS_ALWAYS = HOST_KEYS[::4]  # each host with a kind of its own


@pytest.fixture(scope="module")
def under_hosts(folder: Path, in_campaign: bool) -> dict[Any, list[Any]]:
    keys = HOST_KEYS if in_campaign else HOST_KEYS_ALWAYS
    return cases_on_ranks({(host, *key): partial(HOSTS[host], folder, *key) for host, *key in keys})


@pytest.mark.parametrize("key", [key if key in HOST_KEYS_ALWAYS else campaign(key) for key in HOST_KEYS])
def test_trainer_and_accelerate_resume_bit_for_bit(under_hosts: Any, key: Any) -> None:
    for each in under_hosts[key]:
        before, after = each["before"], each["after"]
        assert before["losses"] == after["losses"]
        assert equal(before["inner"], after["inner"])
        assert equal(list(before["weights"].values()), list(after["weights"].values()))


@pytest.fixture(scope="module")
def others(folder: Path, trained: Any) -> dict[Any, list[Any]]:
    cases = {("full", kind): partial(from_full_file, folder, kind) for kind in KINDS}
    into = {("into", name): partial(resumed, folder, f"{KINDS[0]} 2", name, 2) for name in ("_AdamW", "AdamWFp8")}
    return cases_on_ranks({**cases, **into, "earlier": partial(without_codes, folder)})


@pytest.mark.parametrize("case", [*(("full", kind) for kind in KINDS), "earlier"])
def test_full_files_and_earlier_checkpoints_hold_values_which_are_quantized_again(others: Any, case: Any) -> None:
    for each in others[case]:
        before, after = each["before"], each["after"]
        assert len(before["inner"]) == len(after["inner"]) and any(before["quantized"])  # as many codes and scales
        assert gap_in_steps(before, after) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_file_loads_in_one_process_as_float32_states(folder: Path, others: Any, kind: str) -> None:
    content = torch.load(folder / "full" / f"{kind} 2", weights_only=True)
    optimizer = quantizing(network(5, kind=WideLM), kind)
    optimizer.load_state_dict(content["optimizer"])
    loaded = states_of(optimizer)
    assert not any(map(is_quantized, loaded))
    assert equal(loaded, others["full", kind][0]["before"]["values"])


def test_states_of_8_bits_load_into_optimizers_that_keep_them_otherwise(trained: Any, others: Any) -> None:
    before = trained[KINDS[0], 2][0]
    assert equal(before["values"], others["into", "_AdamW"][0]["values"])  # in float32
    assert 0 < gap_in_steps(before, others["into", "AdamWFp8"][0]) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_written_once_and_nothing_else_is_added(
    folder: Path, trained: Any, kind: str, capsys: Any
) -> None:
    checkpoint = open_checkpoint(folder / f"{kind} 2")
    described = checkpoint.reader.read_metadata().state_dict_metadata
    sizes = {name: entry.size.numel() for name, entry in described.items() if "mics_quantized" in name}
    own = {name: size for name, size in sizes.items() if name.startswith("optimizer_0.")}
    assert sorted(own) == ["optimizer_0.mics_quantized.0_of_2", "optimizer_0.mics_quantized.1_of_2"]
    for rank, size in enumerate(own.values()):
        flags, inner = trained[kind, 2][rank]["quantized"], iter(trained[kind, 2][rank]["inner"])
        parts = 2 if kind == "AdamWFp8" else 3
        codes = [[next(inner).numel() for _ in range(parts if flag else 1)] for flag in flags]
        assert size == 32 + sum(sum(each) for each, flag in zip(codes, flags, strict=True) if flag)
    assert inspect([str(folder / f"{kind} 2")]) == 0  # complete: checksums are as written
    assert "uint8" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "bits"), [("AdamW8bit", 8), ("AdamW4bit", 4)])
@pytest.mark.parametrize("shape", [(64, 128), (ODD, DIM), (31, DIM)])
def test_plans_know_what_low_bit_states_save(kind: str, bits: int, shape: tuple[int, int]) -> None:
    model = nn.Linear(*reversed(shape), bias=False)
    optimizer = quantizing(model, kind)
    with uncompiled():
        model(torch.ones(1, shape[1])).sum().backward()
        optimizer.step()
    states = [state for state in states_of(optimizer) if state.ndim]
    taken = sum(
        state.codes.nbytes + state.scale.nbytes if is_quantized(state) else state.nbytes  # without tables of values
        for state in states
    )
    assert saved_by_low_bits(model.weight.numel(), bits=bits) == 2 * 4 * model.weight.numel() - taken


class NeedsClosure(torch.optim.SGD):
    """Cannot be tried by itself."""

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("it needs a closure")


def refused(folder: Path) -> str:
    fabric = start(partition_size=2)
    model = network(5, kind=WideLM)
    model, optimizer = fabric.setup(model, NeedsClosure(model.parameters(), lr=0.1))
    for group in optimizer.param_groups:
        group.update(dict.fromkeys(("betas", "eps", "amsgrad"), 0))
    return refusal(lambda: fabric.load(folder / f"{KINDS[0]} 2", {"model": model, "optimizer": optimizer}))


def test_an_optimizer_whose_states_are_unknown_is_refused_quantized_ones(folder: Path, trained: Any) -> None:
    for message in on_ranks(refused, folder):
        assert message.startswith("RuntimeError: optimizer_0 has quantized states in the checkpoint, and NeedsClosure")
