"""A small model in loops of one's own: under Fabric, and alone in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import CommunicationOptions, MiCSFabricStrategy
from tests.support.models import OneBlock, TinyLM, tokens

LR = 0.1


def start(*, precision: Any = "32-true", devices: int = 4, **options: Any) -> Fabric:
    communication = CommunicationOptions.NODE.keywords()
    strategy = MiCSFabricStrategy(**{"ranks_per_node": 2, "partition_size": 2, **communication, **options})
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def network(seed: int = 1, kind: Callable[..., TinyLM] = OneBlock, **options: Any) -> TinyLM:
    torch.manual_seed(seed)
    return kind(**options)


def set_up_in_one_call(fabric: Fabric) -> Any:
    model = network()
    return fabric.setup(model, sgd(model))


def set_up_in_two_calls(fabric: Fabric) -> Any:
    model = fabric.setup_module(network())
    return model, fabric.setup_optimizers(sgd(model))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)


def step(fabric: Fabric, model: Any, optimizer: Any, *, seed: int = 0) -> float:
    loss = model(tokens(2, seed=10 * seed + fabric.global_rank))
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def weights(model: Any) -> dict[str, Tensor]:
    """Whole, on all ranks."""
    plain = getattr(model, "_forward_module", model)
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in plain.state_dict().items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance)


def alone(*, steps: int = 1, change: Callable[[nn.Module], None] = lambda _: None) -> dict[str, Tensor]:
    """One process with the data of four ranks."""
    model = network()
    optimizer = sgd(model)
    for index in range(steps):
        (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4)) / 4).backward()
        change(model)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def two_batches_then_one() -> dict[str, Tensor]:
    model = network()
    optimizer = sgd(model)
    (sum(model(tokens(2, seed=10 * index + rank)) for rank in range(4) for index in range(2)) / 8).backward()
    optimizer.step()
    optimizer.zero_grad()
    (sum(model(tokens(2, seed=rank)) for rank in range(4)) / 4).backward()
    optimizer.step()
    return dict(model.state_dict())
