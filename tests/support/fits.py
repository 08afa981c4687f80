"""Fits of a small LightningModule, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler

from tests.support.models import OneBlock, TinyModule, tokens
from tests.support.trainers import make_trainer

STEPS_PER_EPOCH = 2


class AdamModule(TinyModule):
    """A model of one block, trained with AdamW, whose state matters from the second step on."""

    def __init__(self) -> None:
        super().__init__(kind=OneBlock)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, foreach=True)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class TwoOptimizers(pl.LightningModule):
    """Manual optimization with two kinds of optimizer; one block is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = TinyModule().net
        self.net.blocks[1].requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = list(self.parameters())
        return [
            torch.optim.AdamW(parameters[4:], lr=0.02, foreach=True),
            torch.optim.SGD(parameters[:4], lr=0.1, momentum=0.9),
        ]


class Recorder(Callback):
    """Keeps what happened: weights at the start and after each epoch, and the mean loss over ranks of each step."""

    def __init__(self) -> None:
        self.started: dict[str, Tensor] = {}
        self.slots: list[dict[str, Any]] = []
        self.after_epoch: list[dict[str, Tensor]] = []
        self.slots_after_epoch: list[list[dict[str, Any]]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.slots = whole_weights(pl_module), whole_slots(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        self.losses.append(loss.item() / dist.get_world_size())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after_epoch.append(whole_weights(pl_module))
        self.slots_after_epoch.append(whole_slots(trainer))


def whole_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """The whole weights by their names before compilation; every rank calls it."""
    return {
        name.replace("_orig_mod.", ""): (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .clone()
        for name, tensor in module.state_dict().items()
    }


def whole_slots(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Of each parameter in turn what its optimizer keeps for it, whole; every rank calls it."""
    return [
        tree_map_only(Tensor, _whole, dict(optimizer.state.get(parameter, {})))
        for optimizer in trainer.strategy.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def same(one: Any, other: Any) -> bool:
    """Whether two dicts or lists of tensors are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other))


def data() -> DataLoader[Any]:
    """Two batches of the same 8 sequences each on any number of ranks."""
    world_size = dist.get_world_size()
    sampler: DistributedSampler[Any] = DistributedSampler(tokens(16), shuffle=False)
    return DataLoader(tokens(16), batch_size=8 // world_size, sampler=sampler)


def fit(
    folder: Path,
    make: Callable[[], pl.LightningModule] = AdamModule,
    *,
    ckpt_path: Any = None,
    epochs: int = 1,
    strategy: Any = None,
    callbacks: list[Callback] | None = None,
    validate: bool = False,
    weights_only: bool | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Recorder]:
    """Fit on all ranks of the job and hand back what was recorded."""
    torch.manual_seed(0 if ckpt_path is None else 1)  # what a checkpoint restores must differ before
    recorder = Recorder()
    trainer = make_trainer(
        folder,
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[recorder, *(callbacks or [])],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or []),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        **options,
    )
    trainer.fit(make(), data(), data(), ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer, recorder


def files(folder: Path) -> list[str]:
    """What is in a folder, on all ranks at the same time."""
    dist.barrier()
    names = sorted(entry.name for entry in folder.iterdir())
    dist.barrier()
    return names


def refusal(action: Any) -> str:
    """The type and message of the error that a call raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# -- Lightning's ModelCheckpoint and ckpt_path ------------------------------------------------------------------------


class Scored(AdamModule):
    """Its score is best in the second of three epochs."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("score", (0.0, 2.0, 1.0, 0.5)[self.current_epoch], sync_dist=True)
