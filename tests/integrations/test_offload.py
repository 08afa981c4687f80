"""Model states in host memory under every integration: the same bits, and checkpoints for whoever resumes from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mics.sharding.optimizers.on_host import StepOnHost
from tests.integrations import test_loss_scaling
from tests.support import accelerators, loops
from tests.support.loops import network
from tests.support.models import TinyModule, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics

STEPS, MICRO_STEPS, CLIP = 4, 2, 0.1
SAVED_AFTER = STEPS // 2
Seen = tuple[list[str], list[Tensor], bool]  # losses in hexadecimal, this rank's shards, whether copies of them step


class Recorded(TinyModule):
    """Records the losses of training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch)
        self.losses.append(loss.item().hex())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(self.net(batch).item().hex())

    def train_dataloader(self) -> Any:
        begin = SAVED_AFTER * self.current_epoch  # the checkpoint is saved between two epochs
        return torch.utils.data.DataLoader(batches(range(begin, begin + SAVED_AFTER)), batch_size=None)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(batches(range(STEPS, STEPS + 1)), batch_size=None)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        assert all(p.grad is None or p.grad.full_tensor().norm() <= CLIP for p in self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def batches(steps: range) -> list[Tensor]:
    of_rank = 1000 * dist.get_rank()
    return [tokens(2, seed=of_rank + MICRO_STEPS * step + micro) for step in steps for micro in range(MICRO_STEPS)]


def shards(model: Any) -> list[Tensor]:
    return [p._local_tensor.detach().clone() for p in model.parameters()]


def steps_on_host(optimizer: Any) -> bool:
    return isinstance(vars(optimizer).get("_mics_substitution"), StepOnHost)


def of_trainer(folder: Path, source: Path | None, options: dict[str, Any]) -> Seen:
    torch.manual_seed(1)
    module = Recorded()
    each = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder,
        strategy=mics(async_save=True, **options),
        accumulate_grad_batches=MICRO_STEPS,
        gradient_clip_val=CLIP,
        max_epochs=2,
        use_distributed_sampler=False,
        enable_checkpointing=source is None,
        callbacks=[each] if source is None else [],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, ckpt_path=None if source is None else source / "epoch=0.ckpt")
    return module.losses, shards(module), steps_on_host(trainer.strategy.optimizers[0])


def of_fabric(folder: Path, source: Path | None, options: dict[str, Any]) -> Seen:
    fabric = loops.start(**options)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    state = {"model": model, "optimizer": optimizer}
    if source is not None:
        fabric.load(source / "half", state)
    losses = []
    for step in range(0 if source is None else SAVED_AFTER, STEPS):
        for micro_step, batch in enumerate(batches(range(step, step + 1)), start=1):
            with fabric.no_backward_sync(model, enabled=micro_step < MICRO_STEPS):
                loss = model(batch)
                fabric.backward(loss)
            losses.append(loss.item().hex())
        assert fabric.clip_gradients(model, optimizer, max_norm=CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model(tokens(2)).item().hex())
        if source is None and step == SAVED_AFTER - 1:
            fabric.save(folder / "half", state)
            fabric.strategy.wait_for_checkpoints()
    return losses, shards(model), steps_on_host(optimizer.optimizer)


def of_accelerate(folder: Path, source: Path | None, options: dict[str, Any]) -> Seen:
    accelerator = accelerators.start(plugin=options, gradient_accumulation_steps=MICRO_STEPS)
    model, optimizer = accelerators.prepared(accelerator, loops.adam)
    if source is not None:
        accelerator.load_state(str(source / "half"))
    losses = []
    for step in range(0 if source is None else SAVED_AFTER, STEPS):
        for batch in batches(range(step, step + 1)):
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    assert accelerator.clip_grad_norm_(model.parameters(), CLIP) > CLIP
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item().hex())
        with torch.no_grad():
            losses.append(model(tokens(2)).item().hex())
        if source is None and step == SAVED_AFTER - 1:
            accelerator.save_state(str(folder / "half"))
    return losses, shards(model), steps_on_host(optimizer.optimizer)


HOSTS: dict[str, Callable[[Path, Path | None, dict[str, Any]], Seen]] = {
    "trainer": of_trainer,
    "fabric": of_fabric,
    "accelerate": of_accelerate,
}
OFFLOADS = (False, True, "optimizer")
RESUMED = ((False, True), (False, "optimizer"), (True, False), ("optimizer", False), (True, "optimizer"))
SIZES = {"trainer": 4, "fabric": 2, "accelerate": 4}  # ranks per partition group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Any, list[Seen]]:
    """By host and option, what each rank has seen of a run in one piece, which has saved half-way."""
    return cases_on_ranks(
        {
            (host, offload): partial(
                run, folder / f"{host}-{offload}", None, {"offload": offload, "partition_size": SIZES[host]}
            )
            for (host, run), offload in product(HOSTS.items(), OFFLOADS)
        }
    )


@pytest.fixture(scope="module")
def resumed(folder: Path, trained: dict[Any, list[Seen]]) -> dict[Any, list[Seen]]:
    """By host and by option of the checkpoint and of the run, what each rank has seen of the second half."""
    return cases_on_ranks(
        {
            (host, saved, offload): partial(
                run,
                folder / "resumed",
                folder / f"{host}-{saved}",
                {"offload": offload, "partition_size": SIZES[host]},
            )
            for (host, run), (saved, offload) in product(HOSTS.items(), RESUMED)
        }
    )


def assert_same(ours: list[Seen], theirs: list[Seen]) -> None:
    for (losses, weights, _), (other_losses, other_weights, on_host) in zip(ours, theirs, strict=True):
        assert not on_host
        assert losses == other_losses[-len(losses) :] and len(set(losses)) == len(losses) > 1
        assert len(weights) == len(other_weights) > 1
        assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("offload", [True, "optimizer"])
@pytest.mark.parametrize("host", HOSTS)
def test_training_has_the_same_bits(host: str, offload: Any, trained: dict[Any, list[Seen]]) -> None:
    assert_same(trained[host, offload], trained[host, False])
    assert all(on_host == (offload == "optimizer") for *_, on_host in trained[host, offload])


def scaled(folder: Path, offload: Any) -> Any:
    """Scales, skipped steps and weights of the Trainer in ``"16-mixed"``."""
    options = {"flat": {**test_loss_scaling.OPTIONS["flat"], "offload": offload}}
    with patch.dict(test_loss_scaling.OPTIONS, options):
        return test_loss_scaling.fit(folder, "flat", "full")["trained"]


def test_steps_that_overflow_in_float16_are_skipped_on_the_host_too(tmp_path: Path) -> None:
    cases = {offload: partial(scaled, tmp_path / str(offload), offload) for offload in (False, "optimizer")}
    seen = cases_on_ranks(cases)
    for ours, theirs in zip(seen["optimizer"], seen[False], strict=True):
        assert ours.skipped == theirs.skipped != []
        assert ours.scales == theirs.scales
        assert all(torch.equal(ours.weights[name], value) for name, value in theirs.weights.items())


@pytest.mark.parametrize(("saved", "offload"), RESUMED)
@pytest.mark.parametrize("host", HOSTS)
def test_a_run_resumes_with_the_same_bits_whatever_was_in_host_memory(
    host: str, saved: Any, offload: Any, trained: dict[Any, list[Seen]], resumed: dict[Any, list[Seen]]
) -> None:
    assert_same(resumed[host, saved, offload], trained[host, False])
