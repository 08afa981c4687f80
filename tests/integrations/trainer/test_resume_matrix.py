"""Resuming anywhere: losses and samples are those of a run that was never interrupted, on other ranks and groups too.

    saved on 4 ranks, p 2  ->  1 rank; 2 ranks; 4, p 4 over nodes of 2; 8, p 2 and 4  ->  back on 4 ranks, p 2

An optimizer step has the same samples everywhere: with fewer ranks it has more micro-steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import ResumableSampler
from tests.support.campaign import campaign
from tests.support.models import TinyLM, tokens
from tests.support.trainers import make_trainer, mics, on_ranks

STEP = 32  # samples of an optimizer step


STEPS_PER_EPOCH, EPOCHS = 4, 2


BATCH = 8  # samples of a rank in a micro-step, if they are enough for its step


STEPS = STEPS_PER_EPOCH * EPOCHS


SAVED_AFTER = 3  # steps, inside the first epoch


SAVED_AGAIN_AFTER = 6  # steps, inside the second


class Samples(Dataset[Any]):
    """Tokens with their numbers; a few more than fill the epoch's steps."""

    def __init__(self, *, noise: bool = False) -> None:
        self.tokens = tokens(STEP * STEPS_PER_EPOCH + 5)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if self.noise:  # of every generator that has a global state
            shift = int(torch.randint(11, ())) + random.randrange(11) + int(np.random.randint(11))
            return index, (self.tokens[index] + shift) % 11
        return index, self.tokens[index]


class Model(pl.LightningModule):
    """AdamW with a schedule."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = TinyLM(layers=1)
        self.dropout = nn.Dropout(dropout)
        self.net.norm.register_forward_hook(lambda _module, _inputs, hidden: self.dropout(hidden))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, foreach=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Record(Callback):
    """What happened in each optimizer step, over all ranks."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {}
        self.samples: dict[int, list[int]] = {}
        self.rates: dict[int, float] = {}
        self.norms: list[float] = []
        self.validated: list[int] = []
        self.epochs: list[tuple[int, int]] = []
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append((trainer.current_epoch, trainer.global_step))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        self.norms.append(norm.full_tensor().item())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().double()
        dist.all_reduce(loss)
        self.losses.setdefault(self._step, []).append(loss.item() / dist.get_world_size())
        by_rank = [torch.empty_like(batch[0]) for _ in range(dist.get_world_size())]
        dist.all_gather(by_rank, batch[0])
        self.samples.setdefault(self._step, []).extend(torch.stack(by_rank, dim=1).flatten().tolist())
        self.rates[self._step] = trainer.optimizers[0].param_groups[0]["lr"]
        self._step = trainer.global_step

    def facts(self) -> dict[str, Any]:
        names = ("samples", "rates", "norms", "validated", "epochs")
        losses = {step: sum(each) for step, each in self.losses.items()}  # Lightning has divided by the micro-steps
        return {name: getattr(self, name) for name in names} | {"losses": losses, "micro_losses": self.losses}


def loader(micro_steps: int, *, batch_size: int = BATCH, noise: bool = False) -> DataLoader[Any]:
    data = Samples(noise=noise)
    step = dist.get_world_size() * batch_size * micro_steps
    return StatefulDataLoader(
        data, batch_size=batch_size, sampler=ResumableSampler(data, global_batch_size=step, seed=5)
    )


def fit(
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    make: Callable[[], pl.LightningModule] = Model,
    save: list[Callback] | None = None,
    noise: bool = False,
    batch_size: int = BATCH,
    strategy: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train to the end of the last epoch, from a checkpoint or from the start, and hand back what was recorded."""
    seed = dist.get_rank() + (100 if ckpt_path else 0)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    record = Record()
    micro_steps = STEP // (batch_size * dist.get_world_size())
    trainer = make_trainer(
        folder,
        devices=dist.get_world_size(),
        strategy=mics(**(strategy or {})),
        callbacks=[record, *(save or [])],
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in save or []),
        **{
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": micro_steps,
            "gradient_clip_val": 0.3,
            "num_sanity_val_steps": 0,
            "val_check_interval": 0.5,
            "limit_val_batches": 1,
            **options,
        },
    )
    data = loader(micro_steps, batch_size=batch_size, noise=noise)
    held_out = DataLoader(Samples(), batch_size=16)
    trainer.fit(make(), data, held_out, ckpt_path=ckpt_path)
    return {**record.facts(), "steps": trainer.global_step, "batches": trainer.fit_loop.total_batch_idx + 1}


def at_steps(folder: Path, every: int) -> list[Callback]:
    return [ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)]


def assert_same_from(step: int, resumed: dict[str, Any], whole: dict[str, Any], *, tolerance: float) -> None:
    left = range(step, STEPS)
    assert list(resumed["losses"]) == list(left)
    for each in left:
        assert resumed["samples"][each] == whole["samples"][each]
        assert resumed["rates"][each] == whole["rates"][each]
        assert resumed["losses"][each] == pytest.approx(whole["losses"][each], abs=tolerance, rel=0)
    assert resumed["epochs"] == [each for each in whole["epochs"] if each[1] > step]
    assert resumed["steps"] == whole["steps"] == STEPS


# -- the matrix --------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"partition_size": 1, "ranks_per_node": 1}),
    "2 ranks, p 1": (2, {"partition_size": 1}),
    "4 ranks, p 4 over nodes of 2": (4, {"partition_size": 4, "ranks_per_node": 2}),
}


IN_CAMPAIGN: dict[str, tuple[int, dict[str, Any]]] = {
    "8 ranks, p 2": (8, {"partition_size": 2}),
    "8 ranks, p 4 over nodes of 2": (8, {"partition_size": 4, "ranks_per_node": 2}),
}


HOME = {"partition_size": 2}


def batch_of(ranks: int) -> int:
    return min(BATCH, STEP // ranks)


def _at_home(folder: Path) -> dict[str, Any]:
    return fit(folder, strategy=HOME, save=at_steps(folder / "home", SAVED_AFTER))


def _elsewhere(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    source = folder / "home" / f"step={SAVED_AFTER}.ckpt"
    return {
        name: fit(
            folder,
            ckpt_path=source,
            strategy=(SHAPES | IN_CAMPAIGN)[name][1],
            save=at_steps(folder / name, SAVED_AGAIN_AFTER),
            batch_size=batch_of((SHAPES | IN_CAMPAIGN)[name][0]),
        )
        for name in names
    }


def _back(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return {
        name: fit(folder, ckpt_path=folder / name / f"step={SAVED_AGAIN_AFTER}.ckpt", strategy=HOME) for name in names
    }


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("matrix")
    shapes = SHAPES | IN_CAMPAIGN if in_campaign else SHAPES
    whole = on_ranks(_at_home, folder)[0]
    elsewhere: dict[str, Any] = {}
    for world_size in sorted({ranks for ranks, _ in shapes.values()}):
        names = [name for name, (ranks, _) in shapes.items() if ranks == world_size]
        elsewhere |= on_ranks(_elsewhere, folder, names, world_size=world_size)[0]
    return {"whole": whole, "elsewhere": elsewhere, "back": on_ranks(_back, folder, list(shapes))[0]}


def test_the_uninterrupted_run_is_not_trivial(matrix: dict[str, Any]) -> None:
    whole = matrix["whole"]
    steps = list(whole["samples"].values())
    epochs = [list(chain(*steps[:STEPS_PER_EPOCH])), list(chain(*steps[STEPS_PER_EPOCH:]))]
    for samples in epochs:
        assert len(samples) == len(set(samples)) == STEP * STEPS_PER_EPOCH
    assert epochs[0] != epochs[1]
    assert min(whole["norms"]) > 0.3  # every step is clipped
    assert len(set(whole["rates"].values())) == STEPS
    assert whole["losses"][0] - whole["losses"][STEPS - 1] > 0.01
    assert whole["validated"] == [2, 4, 6, 8]
    assert whole["epochs"] == [(0, 4), (1, 8)]


@pytest.mark.parametrize("name", [*SHAPES, *map(campaign, IN_CAMPAIGN)])
def test_on_other_ranks_losses_and_samples_are_as_if_uninterrupted(matrix: dict[str, Any], name: str) -> None:
    resumed, whole = matrix["elsewhere"][name], matrix["whole"]
    assert_same_from(SAVED_AFTER, resumed, whole, tolerance=1e-6)
    assert resumed["validated"] == [4, 6, 8]
    ranks, _ = (SHAPES | IN_CAMPAIGN)[name]
    assert resumed["batches"] * ranks * batch_of(ranks) == whole["batches"] * 4 * batch_of(4)


@pytest.mark.parametrize("name", [*SHAPES, *map(campaign, IN_CAMPAIGN)])
def test_back_on_the_first_ranks_they_still_are(matrix: dict[str, Any], name: str) -> None:
    resumed, whole = matrix["back"][name], matrix["whole"]
    assert_same_from(SAVED_AGAIN_AFTER, resumed, whole, tolerance=1e-6)
    assert resumed["validated"] == [6, 8]  # the first was still to come when it was saved
    assert resumed["batches"] == whole["batches"]


# -- the same ranks and groups: bit for bit, with random numbers at work -----------------------------------------------


class Manual(Model):
    """Two optimizers, stepped by hand in every micro-step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.AdamW(parameters[4:], lr=0.01), torch.optim.SGD(parameters[:4], lr=0.1, momentum=0.9)]


class SaveAtHooks(Callback):
    """Saves at every hook at which Lightning's ModelCheckpoint may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > self.step:  # at a boundary
            self.save(trainer, "batch")
        self.step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "epoch")

    def save(self, trainer: pl.Trainer, hook: str) -> None:
        path = self.folder / hook / f"step={trainer.global_step}.ckpt"
        if f"{hook}/{path.stem}" in MOMENTS:
            trainer.save_checkpoint(path)


def noisy() -> Model:
    return Model(dropout=0.3)


MOMENTS = {  # where the checkpoint was saved: the steps that are left
    "batch/step=3": range(3, 8),
    "batch/step=4": range(4, 8),  # the last micro-step of the epoch
    "validation/step=2": range(2, 8),
    "validation/step=4": range(4, 8),
    "epoch/step=4": range(4, 8),
}


ENDS = {"max_epochs": {"max_epochs": EPOCHS}, "max_steps": {"max_epochs": -1, "max_steps": STEPS}}


def _moments(folder: Path, ends: str) -> dict[str, Any]:
    options = {"make": noisy, "noise": True, "strategy": HOME, **ENDS[ends]}
    facts = {"whole": fit(folder, save=[SaveAtHooks(folder)], **options)}
    for moment in MOMENTS:
        facts[moment] = fit(folder, ckpt_path=folder / f"{moment}.ckpt", **options)
    return facts


@pytest.fixture(scope="module", params=["max_epochs", campaign("max_steps")])
def moments(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw: an uninterrupted run and those that go on from its checkpoints."""
    return on_ranks(_moments, tmp_path_factory.mktemp("moments"), request.param, world_size=2)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_resumes_bit_for_bit_from_any_hook(moments: list[dict[str, Any]], moment: str) -> None:
    for facts in moments:
        whole, resumed = facts["whole"], facts[moment]
        for name in ("micro_losses", "samples", "rates"):
            assert resumed[name] == {step: whole[name][step] for step in MOMENTS[moment]}
        assert (resumed["steps"], resumed["batches"]) == (whole["steps"], whole["batches"])


def test_validation_and_the_end_of_epochs_come_as_if_uninterrupted(moments: list[dict[str, Any]]) -> None:
    whole = moments[0]["whole"]
    assert (whole["validated"], whole["epochs"]) == ([2, 4, 6, 8], [(0, 4), (1, 8)])
    seen = {moment: (moments[0][moment]["validated"], moments[0][moment]["epochs"]) for moment in MOMENTS}
    assert seen == {
        "batch/step=3": ([4, 6, 8], [(0, 4), (1, 8)]),
        "batch/step=4": ([4, 6, 8], [(0, 4), (1, 8)]),
        "validation/step=2": ([4, 6, 8], [(0, 4), (1, 8)]),
        "validation/step=4": ([6, 8], [(0, 4), (1, 8)]),
        "epoch/step=4": ([6, 8], [(1, 8)]),
    }


def _variants(folder: Path) -> dict[str, Any]:
    """Each with a run that resumes from the middle of its first epoch."""
    variants: dict[str, dict[str, Any]] = {
        "32-true, shards": {},
        "bf16-true, one full file": {"precision": "bf16-true", "strategy": {**HOME, "state_dict_type": "full"}},
    }
    facts: dict[str, Any] = {}
    for name, options in variants.items():
        options = {"make": noisy, "strategy": HOME, "limit_val_batches": 0, **options}
        whole = fit(folder, save=at_steps(folder / name, SAVED_AFTER), **options)
        source = folder / name / f"step={SAVED_AFTER}.ckpt"
        facts[name] = {"whole": whole, "resumed": fit(folder, ckpt_path=source, **options)}
    manual = fit(folder, make=Manual, save=at_steps(folder / "manual", 2 * SAVED_AFTER), strategy=HOME, **BY_HAND)
    return {**facts, "manual": manual}


BY_HAND: dict[str, Any] = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "limit_val_batches": 0,
    "batch_size": 4,
}


def _manual_on_two(folder: Path) -> dict[str, Any]:
    source = folder / "manual" / f"step={2 * SAVED_AFTER}.ckpt"
    return fit(folder, make=Manual, ckpt_path=source, strategy=HOME, **{**BY_HAND, "batch_size": 8})


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("variants")
    return {**on_ranks(_variants, folder)[0], "two": on_ranks(_manual_on_two, folder, world_size=2)[0]}


@pytest.mark.parametrize("name", ["32-true, shards", "bf16-true, one full file"])
def test_with_dropout_on_the_same_ranks_losses_are_equal_bit_for_bit(variants: dict[str, Any], name: str) -> None:
    whole, resumed = variants[name]["whole"], variants[name]["resumed"]
    assert_same_from(SAVED_AFTER, resumed, whole, tolerance=0)
    assert resumed["micro_losses"] == {step: whole["micro_losses"][step] for step in range(SAVED_AFTER, STEPS)}


def test_two_optimizers_stepped_by_hand_resume_with_larger_batches_on_fewer_ranks(variants: dict[str, Any]) -> None:
    whole, resumed = variants["manual"], variants["two"]
    assert list(resumed["samples"]) == list(whole["samples"])[SAVED_AFTER:]
    for step in resumed["samples"]:
        assert resumed["samples"][step] == whole["samples"][step]
        assert resumed["losses"][step] == pytest.approx(whole["losses"][step], abs=1e-6, rel=0)
    assert (resumed["steps"], resumed["batches"]) == (whole["steps"], whole["batches"]) == (2 * 2 * STEPS, 2 * STEPS)
