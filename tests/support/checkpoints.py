"""Models on two ranks that are saved and loaded without a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from lightning_mics import checkpoint
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology
from tests.support.models import Block, OneBlock, TinyLM, tokens

SHARDS = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


MakeOptimizer = Callable[[Any], Optimizer]


class WithSpareBlock(TinyLM):
    """Its last block is never used."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.blocks.append(Block(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        spare, self.blocks = self.blocks, self.blocks[:-1]
        try:
            return super().forward(tokens)
        finally:
            self.blocks = spare


class WithExtraState(OneBlock):
    """Keeps a dict of its own in the state dict."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def sharded_model(*, seed: int = 0, make: Callable[[], nn.Module] = TinyLM, nodes: int = 2) -> nn.Module:
    """A model over two ranks: on one node in one partition group, or on two nodes as two replicas."""
    torch.manual_seed(seed)
    model = make()
    topology = Topology(world_size=2, ranks_per_node=2 // nodes, partition_size=2 // nodes)
    shard_model(model, create_partition_groups(topology, device_type="cpu"))
    return model


def train_steps(model: nn.Module, optimizer: Optimizer, *, steps: int = 2) -> None:
    for step in range(steps):
        model(tokens(2, seed=10 * step + dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()


def save_shards(path: Path, model: nn.Module, *optimizers: Optimizer, meta: Any = None) -> None:
    checkpoint.save_sharded(
        path,
        model_state=get_model_state_dict(model),
        optimizer_states=[optimizer_state(model, each, sharded=True) for each in optimizers],
        meta={"meta": meta},
    )


def save_file(path: Path, model: nn.Module, *optimizers: Optimizer) -> None:
    content = {
        "state_dict": {name: unsharded(tensor) for name, tensor in get_model_state_dict(model).items()},
        "optimizer_states": [optimizer_state(model, each, sharded=False) for each in optimizers],
    }
    checkpoint.save_full(path, write=lambda file: torch.save(content, file))


def load_into(path: Path, model: nn.Module, *optimizers: Optimizer, strict: bool = True) -> dict[str, Any]:
    return checkpoint.load(path, model=model, optimizers=optimizers, strict=strict, weights_only=False)


def unsharded(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {name: unsharded(tensor) for name, tensor in get_model_state_dict(model).items()}


def slots_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter in turn what the optimizer keeps for it, whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [{slot: unsharded(value) for slot, value in optimizer.state.get(p, {}).items()} for p in parameters]


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def refusal_of(path: Path, model: nn.Module, *optimizers: Optimizer, strict: bool = True) -> str:
    """The message of the error that loading raises."""
    try:
        load_into(path, model, *optimizers, strict=strict)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, foreach=True)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    return fail
