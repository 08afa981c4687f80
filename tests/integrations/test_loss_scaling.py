"""``"16-mixed"`` under the Trainer, Fabric and Accelerate: scales and weights of one process, also resumed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mics import CommunicationOptions, LossScaleMonitor, MiCSFabricStrategy, MiCSStrategy, sharded
from tests.support.accelerators import plugin_of
from tests.support.accelerators import start as start_accelerate
from tests.support.campaign import campaign
from tests.support.fits import refusal
from tests.support.scaled import (
    INIT_SCALE,
    Trained,
    assert_as_trained,
    fused,
    layers,
    note,
    samples,
    scaler,
    sgd,
    train_alone,
    unsharded,
)
from tests.support.trainers import cases_on_ranks, make_trainer

STEPS, MICRO_STEPS, CLIP, SAVED_AFTER = 6, 2, 0.1, 3  # saved when one more good step will change the scale


HOW: dict[str, Any] = {"steps": STEPS, "micro_steps": MICRO_STEPS, "clip": CLIP}


OPTIONS: dict[str, dict[str, Any]] = {
    "flat": {**CommunicationOptions.PAPER.keywords(), "hierarchical": False, "partition_size": 4},
    "on ranks": {"partition_size": 2, **CommunicationOptions.RANK.keywords()},
}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"flat": sgd, "on ranks": fused}


# -- the Trainer -------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """Notes the scale of each step, and the norm of gradients that hooks and the optimizer see."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd) -> None:
        super().__init__()
        self.net = layers()
        self.make_optimizer = make_optimizer
        self.trained = Trained()
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.before = self.trainer.precision_plugin.scaler.get_scale()
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).full_tensor()))

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if (batch_idx + 1) % MICRO_STEPS == 0:
            now = self.trainer.precision_plugin.scaler.get_scale()
            note(self.trained, self.trainer.global_step - 1, self.before, now)
            assert not self.trainer.strategy._state().schedule.window.is_open


class SaveOnce(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AFTER and not trainer.fit_loop.epoch_loop._should_accumulate():
            trainer.save_checkpoint(self.path)


def batches(rank: int, *, begin: int = 0) -> DataLoader[Any]:
    """All batches of a rank, beginning with those of a step: Lightning does not skip those of the saved run."""
    own = [samples(step, micro_step, rank) for step in range(STEPS) for micro_step in range(MICRO_STEPS)]
    return DataLoader(own[begin * MICRO_STEPS :] + own[: begin * MICRO_STEPS], batch_size=None)


def trainer_of(folder: Path, name: str, *, devices: int = 4, **options: Any) -> pl.Trainer:
    strategy = {**OPTIONS[name], "ranks_per_node": 2, **options.pop("strategy", {})}
    return make_trainer(
        folder,
        strategy=MiCSStrategy(**{**strategy, "partition_size": min(devices, strategy["partition_size"])}),
        devices=devices,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler())],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"accumulate_grad_batches": MICRO_STEPS, "gradient_clip_val": CLIP, **options},
    )


def fit(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """A fit that saves, and another one that goes on from there."""
    strategy, path = {"state_dict_type": kind}, folder / f"{name} {kind}.ckpt"
    logger = CSVLogger(folder, name=f"{name} {kind}") if dist.get_rank() == 0 else False
    callbacks = [SaveOnce(path), LossScaleMonitor()]
    trainer = trainer_of(folder, name, strategy=strategy, logger=logger, callbacks=callbacks)
    module = Module(OPTIMIZERS[name])
    rank = dist.get_rank()
    trainer.fit(module, batches(rank))
    module.trained.weights = unsharded(module.net)
    resumed, second = trainer_of(folder, name, strategy=strategy), Module(OPTIMIZERS[name])
    second.net.last.bias.data.add_(1)
    resumed.fit(second, batches(rank, begin=SAVED_AFTER), ckpt_path=path)
    second.trained.weights = unsharded(second.net)
    metrics, state = dict(trainer.callback_metrics), trainer.precision_plugin.scaler.state_dict()
    trainer.validate(module, batches(rank), verbose=False)
    return {
        "changed in evaluation": trainer.precision_plugin.scaler.state_dict() != state,
        "trained": module.trained,
        "norms": module.norms,
        "skipped": trainer.strategy.skipped_steps,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "resumed": second.trained,
        "skipped after resuming": resumed.strategy.skipped_steps,
    }


class Manual(Module):
    """Steps by hand, after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        own, optimizer = self.trainer.precision_plugin.scaler, self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch))
        before = own.get_scale()
        optimizer.step()
        note(self.trained, batch_idx, before, own.get_scale())

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def fit_by_hand(folder: Path) -> Trained:
    module = Manual()
    trainer = trainer_of(folder, "on ranks", accumulate_grad_batches=1, gradient_clip_val=None)
    trainer.fit(module, DataLoader([samples(step, 0, dist.get_rank()) for step in range(STEPS)], batch_size=None))
    module.trained.weights = unsharded(module.net)
    return module.trained


def load_elsewhere(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """The state of the scaler that another number of ranks resumes with."""
    trainer, module = trainer_of(folder, name, devices=2, max_steps=SAVED_AFTER), Module(OPTIMIZERS[name])
    trainer.fit(module, batches(dist.get_rank()), ckpt_path=folder / f"{name} {kind}.ckpt")
    return trainer.precision_plugin.scaler.state_dict()


def lbfgs(folder: Path) -> str:
    module = Module(lambda parameters: torch.optim.LBFGS(list(parameters)))
    return refusal(lambda: trainer_of(folder, "flat").fit(module, batches(0)))


def float16_weights(folder: Path) -> str:
    module = Module()
    module.net.last.half()
    return refusal(lambda: trainer_of(folder, "flat").fit(module, batches(0)))


# -- Fabric ------------------------------------------------------------------------------------------------------------


def start_fabric(name: str, *, scale: float = INIT_SCALE) -> Fabric:
    strategy = MiCSFabricStrategy(ranks_per_node=2, **OPTIONS[name])
    plugin = FabricMixedPrecision("16-mixed", "cpu", scaler(scale))
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy, plugins=[plugin])
    fabric.launch()
    return fabric


def train_by_fabric(folder: Path, name: str) -> dict[str, Any]:
    fabric, trained = start_fabric(name), Trained()
    net = layers()
    model, optimizer = fabric.setup(net, OPTIMIZERS[name](net.parameters()))
    for step in range(STEPS):
        if step == SAVED_AFTER:
            fabric.save(folder / f"fabric {name}", {"model": model, "optimizer": optimizer})
            saved = fabric.strategy.precision.scaler.state_dict()
        fabric_step(fabric, model, optimizer, step, trained)
    trained.weights = unsharded(model._forward_module)
    second = start_fabric(name)
    net = layers()
    model, optimizer = second.setup(net, OPTIMIZERS[name](net.parameters()))
    rest = second.load(folder / f"fabric {name}", {"model": model, "optimizer": optimizer})
    loaded, resumed = second.strategy.precision.scaler.state_dict(), Trained()
    for step in range(SAVED_AFTER, STEPS):
        fabric_step(second, model, optimizer, step, resumed)
    resumed.weights = unsharded(model._forward_module)
    return {
        "trained": trained,
        "resumed": resumed,
        "skipped": fabric.strategy.skipped_steps,
        "saved": saved,
        "loaded": loaded,
        "rest": rest,
    }


def train_with_penalty() -> dict[str, Tensor]:
    """Three steps, each with a penalty on weights in its first micro-step only."""
    fabric, net = start_fabric("on ranks", scale=2.0**8), layers()
    model, optimizer = fabric.setup(net, sgd(net.parameters()))
    for step in range(3):
        with fabric.no_backward_sync(model):
            penalty = net.blocks[0][0].weight.square().sum()
            fabric.backward(model(samples(step, 0, fabric.global_rank)) + penalty)
        fabric.backward(model(samples(step, 1, fabric.global_rank)))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return unsharded(net)


def penalized_alone() -> dict[str, Tensor]:
    """The same in one process, without scaling."""
    model = layers()
    optimizer = sgd(model.parameters())
    for step in range(3):
        for rank in range(4):
            for micro_step in range(MICRO_STEPS):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(samples(step, micro_step, rank))
                if micro_step == 0:
                    loss = loss + model.blocks[0][0].weight.square().sum()
                (loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return unsharded(model)


def fabric_step(fabric: Fabric, model: Any, optimizer: Any, step: int, trained: Trained) -> None:
    own, window = fabric.strategy.precision.scaler, sharded(model).schedule.window
    for micro_step in range(MICRO_STEPS):
        boundary = micro_step == MICRO_STEPS - 1
        with nullcontext() if boundary else fabric.no_backward_sync(model):
            fabric.backward(model(samples(step, micro_step, fabric.global_rank)) / MICRO_STEPS)
    before = own.get_scale()
    fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
    optimizer.step()
    assert not window.is_open  # also after a skipped step
    optimizer.zero_grad()
    note(trained, step, before, own.get_scale())


# -- Accelerate --------------------------------------------------------------------------------------------------------


def start_fp16(name: str) -> Any:
    """An Accelerator with fp16 on CPUs, as it is on GPUs; on CPUs it would neither compute in it nor scale."""
    accelerator = start_accelerate(
        plugin=OPTIONS[name], mixed_precision="fp16", gradient_accumulation_steps=MICRO_STEPS
    )
    accelerator.native_amp, accelerator.scaler = True, scaler()
    return accelerator


def train_by_accelerate(folder: Path, name: str) -> dict[str, Any]:
    accelerator, trained = start_fp16(name), Trained()
    net = layers()
    model, optimizer = accelerator.prepare(net, OPTIMIZERS[name](net.parameters()))
    if name == "flat":  # torch steps an optimizer without states, which AdamW counts
        accelerator.save_state(folder / f"before {name}")  # before there is a scale
    first = accelerator.scaler.state_dict()
    for step in range(STEPS):
        if step == SAVED_AFTER:
            accelerator.save_state(folder / f"state {name}")
            plugin_of(accelerator).save_checkpoint(accelerator, folder / f"accelerate {name}", note=1)
            saved = accelerator.scaler.state_dict()
        accelerate_step(accelerator, model, optimizer, step, trained)
    trained.weights = unsharded(model)
    facts = {"trained": trained, "first": first, "saved": saved}
    for how in ("state", "accelerate"):
        second, resumed = start_fp16(name), Trained()
        net = layers()
        model, optimizer = second.prepare(net, OPTIMIZERS[name](net.parameters()))
        if how == "state":
            second.load_state(folder / f"state {name}")
        else:
            facts["rest"] = plugin_of(second).load_checkpoint(second, folder / f"accelerate {name}")
        facts[f"loaded {how}"] = second.scaler.state_dict()
        for step in range(SAVED_AFTER, STEPS):
            accelerate_step(second, model, optimizer, step, resumed)
        resumed.weights = unsharded(model)
        facts[f"resumed {how}"] = resumed
    AcceleratorState._reset_state(reset_partial_state=True)
    return facts


def accelerate_step(accelerator: Any, model: Any, optimizer: Any, step: int, trained: Trained) -> None:
    for micro_step in range(MICRO_STEPS):
        with accelerator.accumulate(model):
            before = accelerator.scaler.get_scale()
            accelerator.backward(model(samples(step, micro_step, accelerator.process_index)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    note(trained, step, before, accelerator.scaler.get_scale())
    if not optimizer.defaults.get("fused"):  # Accelerate does not see what is skipped inside of a fused step
        assert accelerator.optimizer_step_was_skipped == (step in trained.skipped)
    assert not sharded(model).schedule.window.is_open


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scaled")


RUNS = [("flat", "full"), ("on ranks", "sharded")]


TRAINED = [("fit", "flat"), ("fit", "on ranks"), ("fabric", "on ranks"), ("accelerate", "flat")]


IN_CAMPAIGN = [("fabric", "flat"), ("accelerate", "on ranks")]


@pytest.fixture(scope="module")
def seen(folder: Path, in_campaign: bool) -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {("fit", name): partial(fit, folder, name, kind) for name, kind in RUNS}
    train = {"fabric": train_by_fabric, "accelerate": train_by_accelerate}
    for integration, name in (*TRAINED[2:], *(IN_CAMPAIGN if in_campaign else [])):
        cases[integration, name] = partial(train[integration], folder, name)
    cases["penalty"], cases["by hand"] = train_with_penalty, partial(fit_by_hand, folder)
    cases["lbfgs"], cases["half"] = partial(lbfgs, folder), partial(float16_weights, folder)
    return cases_on_ranks(cases)


def alone(name: str) -> Trained:
    return train_alone(**HOW, make_optimizer=OPTIMIZERS[name])


def after_saving(trained: Trained) -> Trained:
    skipped = [step for step in trained.skipped if step >= SAVED_AFTER]
    return Trained(trained.scales[SAVED_AFTER:], skipped, trained.weights)


@pytest.mark.parametrize(("integration", "name"), [*TRAINED, *(campaign(*case) for case in IN_CAMPAIGN)])
def test_scales_and_weights_are_those_of_one_process(integration: str, name: str, seen: dict[Any, Any]) -> None:
    of_one = alone(name)
    assert len(of_one.skipped) >= 2
    assert of_one.skipped[-1] >= SAVED_AFTER > of_one.skipped[0]
    for of_rank in seen[integration, name]:
        assert_as_trained(of_rank["trained"], of_one)


def test_steps_by_hand_are_those_of_one_process(seen: dict[Any, Any]) -> None:
    of_one = train_alone(steps=STEPS)
    assert len(of_one.skipped) >= 2
    for trained in seen["by hand"]:
        assert_as_trained(trained, of_one)


def test_an_evaluation_leaves_the_scale_alone(seen: dict[Any, Any]) -> None:
    for name in OPTIONS:
        assert not any(of_rank["changed in evaluation"] for of_rank in seen["fit", name])


@pytest.mark.parametrize(
    ("integration", "name", "resumed"),
    [
        ("fit", "flat", "resumed"),
        ("fit", "on ranks", "resumed"),
        ("fabric", "on ranks", "resumed"),
        ("accelerate", "flat", "resumed state"),
        ("accelerate", "flat", "resumed accelerate"),
        campaign("fabric", "flat", "resumed"),
        campaign("accelerate", "on ranks", "resumed state"),
        campaign("accelerate", "on ranks", "resumed accelerate"),
    ],
)
def test_a_resumed_run_has_the_scales_and_weights_of_an_uninterrupted_one(
    integration: str, resumed: str, name: str, seen: dict[Any, Any]
) -> None:
    for of_rank in seen[integration, name]:
        whole, second = after_saving(of_rank["trained"]), of_rank[resumed]
        assert second.scales == whole.scales
        assert second.skipped == whole.skipped
        for key, value in whole.weights.items():
            torch.testing.assert_close(second.weights[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_unscaled_before_they_are_clipped(name: str, seen: dict[Any, Any]) -> None:
    for of_rank in seen["fit", name]:
        taken = [norm for step, norm in enumerate(of_rank["norms"]) if step not in of_rank["trained"].skipped]
        assert max(taken) == pytest.approx(CLIP, rel=1e-4)


def test_gradients_of_sharded_weights_are_unscaled_and_clipped_with_the_others(seen: dict[Any, Any]) -> None:
    expected = penalized_alone()
    for of_rank in seen["penalty"]:
        for key, value in expected.items():
            torch.testing.assert_close(of_rank[key], value, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_skipped_steps_are_counted_logged_and_saved(name: str, seen: dict[Any, Any]) -> None:
    for of_rank in seen["fit", name]:
        trained = of_rank["trained"]
        assert of_rank["skipped"] == of_rank["skipped after resuming"] == len(trained.skipped)
        assert of_rank["metrics"] == {"loss_scale": trained.scales[-1], "skipped_steps": len(trained.skipped)}
    for of_rank in seen.get(("fabric", name), []):
        assert of_rank["skipped"] == len(of_rank["trained"].skipped)


@pytest.mark.parametrize(("of_fabric", "of_accelerate"), [("on ranks", "flat"), campaign("flat", "on ranks")])
def test_fabric_and_accelerate_save_the_scale_with_the_model(
    of_fabric: str, of_accelerate: str, seen: dict[Any, Any]
) -> None:
    for of_rank in seen["fabric", of_fabric]:
        assert of_rank["loaded"] == of_rank["saved"] != scaler().state_dict()
        assert of_rank["rest"] == {}
    for of_rank in seen["accelerate", of_accelerate]:
        assert of_rank["first"]["scale"] == INIT_SCALE
        assert of_rank["loaded state"] == of_rank["loaded accelerate"] == of_rank["saved"]
        assert of_rank["rest"]["note"] == 1
        assert "MixedPrecision" not in of_rank["rest"]


def test_other_numbers_of_ranks_resume_with_the_same_scale(folder: Path, seen: dict[Any, Any]) -> None:
    cases = {name: partial(load_elsewhere, folder, name, kind) for name, kind in RUNS}
    for name, of_ranks in cases_on_ranks(cases, world_size=2).items():
        trained = seen["fit", name][0]["trained"]
        for state in of_ranks:
            assert state["scale"] == trained.scales[SAVED_AFTER - 1]
            assert state["skipped_steps"] == len([step for step in trained.skipped if step < SAVED_AFTER])


def test_what_cannot_be_scaled_is_rejected_before_training(seen: dict[Any, Any]) -> None:
    for said in seen["lbfgs"]:
        assert said.startswith("ValueError: LBFGS runs several backwards in one step")
    for said in seen["half"]:
        assert said.startswith("ValueError: parameter 'net.last.weight' is in float16, and precision='16-mixed'")


def test_a_full_file_holds_the_scale_where_lightning_looks_for_it(folder: Path, seen: dict[Any, Any]) -> None:
    state = torch.load(folder / "flat full.ckpt", weights_only=True)["MixedPrecision"]
    plugin = MixedPrecision("16-mixed", "cpu")
    plugin.load_state_dict(state)  # into torch's own scaler
    assert plugin.scaler.get_scale() == seen["fit", "flat"][0]["trained"].scales[SAVED_AFTER - 1]
