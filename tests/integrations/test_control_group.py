"""What ranks tell each other goes over gloo: the default group, which is NCCL's on GPUs, serves sharding alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_mics import CommunicationOptions
from lightning_mics._torch.collective_operations import group_of
from lightning_mics.collectives.agreement import on_all_ranks, on_rank_0
from lightning_mics.collectives.control_plane import control_plane
from lightning_mics.integrations.fabric import MiCSFabricStrategy
from tests.support.accelerators import plugin_of, prepared, start, step
from tests.support.loops import network, sgd
from tests.support.models import OneBlock, TinyModule, loader_of_tokens, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics, on_ranks

OPTIONS = {"partition_size": 2, **CommunicationOptions.NODE.keywords()}


class DefaultGroup(TorchDispatchMode):
    """Counts the collectives of the default process group, and of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        group = group_of(operation, args)
        if group is not None:
            found = self.seen if group is dist.group.WORLD else self.elsewhere
            found[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def recorded(function: Callable[[], None]) -> tuple[dict[str, int], int]:
    """The collectives of the default group in ``function``, and the number of those of other groups."""
    with DefaultGroup() as mode:
        function()
    return dict(mode.seen), sum(mode.elsewhere.values())


class Logged(TinyModule):
    """Logs a number over all ranks."""

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("shared", loss.detach(), sync_dist=True)
        return loss


class FromStart(pl.Callback):
    """Records from the first step to the end of the fit, with validations, saves and decisions of all ranks inside."""

    def __init__(self) -> None:
        self.mode = DefaultGroup()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.strategy.barrier()
        assert trainer.strategy.broadcast(trainer.global_rank, src=1) == 1
        assert trainer.strategy.reduce_boolean_decision(True)
        assert not trainer.strategy.reduce_boolean_decision(trainer.global_rank != 2)
        assert trainer.strategy.reduce_boolean_decision(trainer.global_rank == 2, all=False)
        assert not trainer.strategy.reduce_boolean_decision(False, all=False)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.mode.__exit__(None, None, None)


def trainer_fits(folder: Path, **options: Any) -> tuple[dict[str, int], int]:
    recording = FromStart()
    saving = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        folder,
        strategy=mics(**{**OPTIONS, **options}),
        callbacks=[recording, saving, EarlyStopping("val_loss", patience=10)],
        enable_checkpointing=True,
        val_check_interval=1,
        limit_val_batches=2,
        max_steps=2,
    )
    trainer.fit(Logged(kind=OneBlock), loader_of_tokens(24), loader_of_tokens(24))
    return dict(recording.mode.seen), sum(recording.mode.elsewhere.values())


def trainer_sets_up(folder: Path) -> tuple[dict[str, int], int]:
    trainer = make_trainer(folder, strategy=mics(**OPTIONS), max_steps=0)
    return recorded(lambda: trainer.fit(Logged(kind=OneBlock), loader_of_tokens(24)))


def fabric_trains(folder: Path) -> tuple[dict[str, int], int]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=MiCSFabricStrategy(ranks_per_node=2, **OPTIONS))
    fabric.launch()
    model = network()
    model, optimizer = fabric.setup(model, sgd(model))

    def train() -> None:
        for _ in range(2):
            fabric.backward(model(tokens(2, seed=fabric.global_rank)))
            optimizer.step()
            optimizer.zero_grad()
        fabric.barrier()
        assert fabric.broadcast(fabric.global_rank, src=3) == 3
        assert fabric.all_reduce(torch.tensor(1.0), reduce_op="sum") == 4
        fabric.save(folder / "state", {"model": model, "optimizer": optimizer})
        fabric.load(folder / "state", {"model": model, "optimizer": optimizer})

    return recorded(train)


def accelerate_trains(folder: Path) -> tuple[dict[str, int], int]:
    accelerator = start()
    model, optimizer = prepared(accelerator)

    def train() -> None:
        step(accelerator, model, optimizer)
        plugin_of(accelerator).save_checkpoint(accelerator, folder / "state")
        plugin_of(accelerator).load_checkpoint(accelerator, folder / "state")

    return recorded(train)


CASES: dict[str, Callable[[Path], tuple[dict[str, int], int]]] = {
    "Trainer": trainer_fits,
    "Trainer, full files": partial(trainer_fits, state_dict_type="full"),
    "Trainer, asynchronous saves": partial(trainer_fits, async_save=True),
    "Fabric": fabric_trains,
    "Accelerate": accelerate_trains,
    "start": trainer_sets_up,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[dict[str, int], int]]]:
    folder = tmp_path_factory.mktemp("control")
    return cases_on_ranks({case: partial(run, folder / case) for case, run in CASES.items()})


@pytest.mark.parametrize("case", [case for case in CASES if case != "start"])
def test_nothing_but_sharding_communicates_over_groups_of_devices(case, found):
    for on_default, elsewhere in found[case]:
        assert on_default == {}
        assert elsewhere > 0


def test_at_the_start_the_default_group_sends_initial_weights_alone(found):
    for on_default, _ in found["start"]:
        assert set(on_default) == {"c10d.broadcast_.default"}


def one_rank() -> list[Any]:
    """What is told to one rank, whose default group serves no CPU tensors, as NCCL's does not."""
    with DefaultGroup() as mode, patch.object(dist, "get_backend", lambda *_: "nccl"):
        told = [on_rank_0(lambda: 1), on_all_ranks(lambda: 2), control_plane().largest(torch.tensor([3])).tolist()]
    return [*told, dict(mode.seen)]


def test_one_rank_alone_tells_itself_over_gloo_too():
    assert on_ranks(one_rank, world_size=1) == [[1, [2], [3], {}]]
