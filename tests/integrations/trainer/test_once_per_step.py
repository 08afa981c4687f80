"""Once per step under a Trainer: evaluation in mid-window, weights exchanged by callbacks, activation checkpointing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mics import CommunicationOptions
from lightning_mics._torch.fsdp import sharded_parameters
from tests.support.models import TinyLM, TinyModule, tokens
from tests.support.trainers import make_trainer, mics

RANKS, WINDOW = 4, 4


TRAINING = tokens(8 * WINDOW, seed=8)  # two per rank and micro-step


VALIDATION = tokens(8 * 3, seed=9)


NODE = CommunicationOptions.NODE.keywords()


FACTOR = 1.5


class ExchangeWeights(pl.Callback):
    """Evaluates other weights than it trains, as moving averages do, in a way that torch does not record."""

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        for parameter in module.parameters():
            parameter.data.mul_(FACTOR)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for parameter in module.parameters():
            parameter.data.div_(FACTOR)


class LookAtTraffic(pl.Callback):
    """Notes what this rank sends between nodes in each validation."""

    def __init__(self) -> None:
        self.validations: list[float] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.before = between_bytes(trainer)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validations.append(between_bytes(trainer) - self.before)


class LossesOf(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.validation_losses: list[float] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self(batch)
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)
        self.validation_losses.append(loss.item())


def between_bytes(trainer: pl.Trainer) -> float:
    return sum(sent.between_bytes for sent in trainer.strategy.traffic.by_technique().values())


def loader_of(samples: Tensor) -> DataLoader[Any]:
    return DataLoader(samples[dist.get_rank() :: RANKS], batch_size=2)


def root_bytes(module: pl.LightningModule) -> int:
    """What each rank sends between two nodes for one gather of the root's own parameters: its shard of each."""
    return sum(-(-p.size(0) // RANKS) * (p.numel() // p.size(0)) * p.itemsize for p in sharded_parameters(module))


def fit(
    folder: str, exchange: bool, options: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Tensor], int]:
    torch.manual_seed(0)
    module, traffic = LossesOf(), LookAtTraffic()
    trainer = make_trainer(
        folder,
        strategy=mics(partition_size=4, **options),
        use_distributed_sampler=False,
        accumulate_grad_batches=WINDOW,
        val_check_interval=2,  # in mid-window
        num_sanity_val_steps=0,
        callbacks=[traffic, *([ExchangeWeights()] if exchange else [])],
    )
    trainer.fit(module, loader_of(TRAINING), loader_of(VALIDATION))
    weights = {name: parameter.full_tensor() for name, parameter in module.named_parameters()}
    return module.validation_losses, traffic.validations, weights, root_bytes(module)


def in_one_process() -> tuple[list[float], dict[str, Tensor]]:
    """Validation losses of the exchanged weights before and after the only step, and the weights it leads to."""
    torch.manual_seed(0)
    model = TinyLM()

    def evaluate() -> list[float]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(FACTOR)
            losses = [model(VALIDATION[8 * i : 8 * i + 8]).item() for i in range(3)]
            for parameter in model.parameters():
                parameter.div_(FACTOR)
        return losses

    losses = evaluate()
    model(TRAINING).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return losses + evaluate(), {f"net.{name}": p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, NODE], ids=str)
def test_an_evaluation_in_mid_window_sees_the_weights_that_a_callback_has_put_there(tmp_path, options, on_shared_ranks):
    losses, weights = in_one_process()
    for seen, _, ours, _ in on_shared_ranks(fit, str(tmp_path), True, options):
        assert seen == pytest.approx(losses, rel=1e-5)
        assert losses[0] != pytest.approx(losses[3], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)


def test_an_evaluation_gathers_between_nodes_once_for_all_batches(tmp_path, on_shared_ranks):
    schedules = [{}, {"cache_parameters": "node"}, {"cache_parameters": "never"}]
    by_ranks, by_nodes, always = (on_shared_ranks(fit, str(tmp_path), False, options) for options in schedules)
    for (_, few, _, root), (_, as_few, _, _), (_, many, _, _) in zip(by_ranks, by_nodes, always, strict=True):
        assert len(few) == len(many) == 2 and few == as_few
        assert [3 * sent - 2 * root for sent in few] == many  # three batches, between which the root stays unsharded
        assert few[0] > root > 0


@pytest.mark.parametrize(
    ("options", "cached", "gathered"),
    [
        ({}, 'rank ("auto": ', "once per step"),
        ({"cache_parameters": "node"}, "node (for ", "once per step"),
        ({"cache_parameters": "never"}, 'never ("node" would take ', "at every use"),
    ],
    ids=str,
)
def test_the_table_at_start_says_where_parameters_are_cached(tmp_path, options, cached, gathered, on_shared_ranks):
    table = on_shared_ranks(start, str(tmp_path), options)[0]
    assert f"cache parameters       {cached}" in table
    assert f"inter-node gathers     {gathered}\n" in table


def start(folder: str, options: dict[str, str]) -> str:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_mics.integrations.trainer.strategy.rank_zero_info", lines.append)
        trainer = make_trainer(
            folder,
            strategy=mics(partition_size=4, **options),
            limit_train_batches=1,
            limit_val_batches=0,
        )
        trainer.fit(TinyModule(), loader_of(TRAINING))
    return "\n".join(lines)
