"""Training with the optimizers of torchao that keep their states in 8 bits, 4 bits or float8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from tests.support.models import VOCAB, TinyModule

KINDS = ("AdamW8bit", "AdamW4bit", "AdamWFp8")

DIM, ODD = 128, 141


class Layer(nn.Module):
    """Matrices whose shards are quantized on all ranks, on the last alone, on all but the last, or on none.

    torchao quantizes shards of 4,096 values and more that are whole blocks, of 256 values or 128.
    """

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(DIM, DIM)
        self.up = nn.Linear(DIM, ODD)
        self.down = nn.Linear(ODD, DIM)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, seq, dim] -> same
        return hidden + self.down(torch.tanh(self.up(torch.tanh(self.square(hidden)))))


class WideLM(nn.Module):
    """A language model of two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, seq] -> []
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class WideModule(TinyModule):
    """Trained with an optimizer of torchao.

    Args:
        kind: Name of the optimizer's class.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind=WideLM)
        self.kind = kind

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return quantizing(self, self.kind)


def quantizing(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """An optimizer of torchao.

    Args:
        model: Model whose parameters it updates.
        kind: Name of its class.
    """
    import torchao.optim

    made: torch.optim.Optimizer = getattr(torchao.optim, kind)(model.parameters(), lr=0.01)
    return made


@contextmanager
def uncompiled() -> Iterator[None]:
    """Steps of torchao as they are written: forked ranks that compile side by side mix up their graphs."""
    with patch.object(torch, "compile", lambda function, **_: function):
        yield


def is_quantized(value: Any) -> bool:
    """Whether the shard of a state is kept in codes and scales."""
    return hasattr(local(value), "codes")


def local(value: Any) -> Any:
    """This rank's shard."""
    return value.to_local() if isinstance(value, DTensor) else value


def states_of(optimizer: Any) -> list[Any]:
    """The states of each parameter in turn, in the order of their names."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    return [value for p in parameters for _, value in sorted(optimizer.state[p].items())]


def inner_of(optimizer: Any) -> list[Tensor]:
    """All codes, scales and other values of this rank, in order, as bytes: each [bytes], copied."""
    inner = []
    for value in map(local, states_of(optimizer)):
        names = value.__tensor_flatten__()[0] if is_quantized(value) else ()
        inner += [getattr(value, name) for name in names] or [value]
    return [tensor.reshape(-1).view(torch.uint8).clone() for tensor in inner]


def values_of(optimizer: Any) -> list[Tensor]:
    """The values of all states, unsharded: each [any]."""
    return [_unsharded(_values(value), value) for value in states_of(optimizer)]


def _values(value: Any) -> Tensor:
    return local(value).dequantize() if is_quantized(value) else local(value)


def _unsharded(shard: Tensor, like: Any) -> Tensor:
    """A tensor, [any], unsharded, of which ``shard`` is this rank's part."""
    if not isinstance(like, DTensor):
        return shard.clone()
    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(shard, like.device_mesh, like.placements, **options).full_tensor().clone()


def steps_of(optimizer: Any) -> list[Tensor]:
    """For each value of :func:`values_of` the distance to the next that its codes can have; 0 if it has no codes."""
    return [_unsharded(_steps(value), value) for value in states_of(optimizer)]


def _steps(value: Any) -> Tensor:
    shard = local(value)
    if not is_quantized(value):
        return torch.zeros_like(shard)
    every = shard.qmap if hasattr(shard, "qmap") else torch.arange(256, dtype=torch.uint8).view(shard.codes.dtype)
    every = every.float()[every.float().isfinite()].unique()  # sorted
    scaled = shard.dequantize().view(len(shard.scale), -1) / shard.scale.view(-1, 1)
    at = (scaled.unsqueeze(-1) - every).abs().argmin(-1)  # [blocks, values]
    gaps = every.diff()
    wider = torch.maximum(gaps[(at - 1).clamp(min=0)], gaps[at.clamp(max=len(gaps) - 1)])
    return (wider * shard.scale.view(-1, 1)).view(shard.shape)
