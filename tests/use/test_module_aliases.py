"""A module with two names is sharded once, and its checkpoints load under all of its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import checkpoint
from lightning_mics.sharding.blocks import find_blocks
from tests.support.beside_ddp import largest_gap, train
from tests.support.checkpoints import (
    adamw,
    is_same,
    load_into,
    save_file,
    save_shards,
    sharded_model,
    slots_of,
    train_steps,
    weights_of,
)
from tests.support.models import TinyLM


class TwoNames(TinyLM):
    """Its list of blocks, a block, a layer inside a block and a buffer's owner have second names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.blocks
        self.second = self.blocks[1]
        self.up = self.blocks[1].up


class NameFirst(nn.Module):
    """The second name comes before the first."""

    def __init__(self) -> None:
        super().__init__()
        net = TinyLM(layers=2)
        self.up = net.blocks[0].up
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.net(tokens)
        return loss


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (TwoNames, "sharded"),
        (TwoNames, "full"),
        (TwoNames, "of one process"),
        (NameFirst, "sharded"),
        (NameFirst, "full"),
    ],
)
def test_checkpoints_of_a_model_with_two_names_load(run_shared, tmp_path, kind, form):
    assert run_shared(2, _save_and_load, tmp_path / "model.ckpt", kind, form) == [True, True]


def _save_and_load(path: Path, kind: Any, form: str) -> bool:
    model, other = sharded_model(make=kind, nodes=1), sharded_model(make=kind, seed=1, nodes=1)
    optimizer, empty = adamw(model.parameters()), adamw(other.parameters())
    train_steps(model, optimizer)
    if form == "of one process":
        weights = weights_of(model)
        if torch.distributed.get_rank() == 0:
            torch.save(weights, path)
        torch.distributed.barrier()
        checkpoint.load_raw(path, other, strict=True, weights_only=True)
        return is_same(weights_of(other), weights)
    (save_shards if form == "sharded" else save_file)(path, model, optimizer)
    load_into(path, other, empty)
    return is_same(weights_of(other), weights_of(model)) and is_same(slots_of(empty), slots_of(optimizer))


def test_the_last_of_two_values_is_loaded_as_in_one_process(run_shared, tmp_path):
    assert run_shared(2, _load_two_values, tmp_path / "plain.pt") == [True, True]


def _load_two_values(path: Path) -> bool:
    plain = TwoNames()
    state = {
        name: torch.full_like(tensor, float(index)) for index, (name, tensor) in enumerate(plain.state_dict().items())
    }
    plain.load_state_dict(state)
    if torch.distributed.get_rank() == 0:
        torch.save(state, path)
    torch.distributed.barrier()
    model = sharded_model(make=TwoNames, nodes=1)
    checkpoint.load_raw(path, model, strict=True, weights_only=True)
    return is_same(weights_of(model), dict(plain.state_dict()))


class Layered(nn.Module):
    """A layer of a block with a second name, which the block uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)))
        self.last = self.blocks[1][2]
        self.frozen = self.blocks

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        out: Tensor = self.blocks(x)
        return out


def test_a_model_with_two_names_trains_as_under_ddp(run_shared):
    for gaps in run_shared(2, _train_with_two_names):
        assert gaps == [pytest.approx(0, abs=1e-6)] * 2


def _train_with_two_names() -> list[float]:
    by_ddp = train(Layered, "ddp", steps=2)
    return [largest_gap(by_ddp, train(Layered, mode, steps=2)) for mode in ("every", "rank")]


def test_a_module_of_two_blocks_is_still_rejected():
    model = TinyLM()
    model.blocks[1].up = model.blocks[0].up
    with pytest.raises(ValueError, match="are one tied parameter in two parameter groups"):
        find_blocks(model)
