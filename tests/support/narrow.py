"""A network with parameters of fewer rows than ranks, which are sharded along another dim."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_mics.sharding import shard_model as sharding

DIM, LAYERS = 16, 3
NARROW = [  # of more than three ranks
    *(f"layers.{layer}.{name}" for layer in range(LAYERS) for name in ("down", "kernel")),
    "head.weight",
]


class Layer(nn.Module):
    """A frozen linear layer, matrices of two rows and of two columns beside it, and shapes that divide by no ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, DIM, dtype=dtype).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, DIM) / DIM)
        self.up = nn.Parameter(torch.randn(DIM, 2) / 2)
        self.kernel = nn.Parameter(torch.randn(2, 3, DIM // 2) / DIM)
        self.odd = nn.Parameter(torch.randn(3, 5) / DIM)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        other = torch.einsum("bhd,hcd->bc", x.view(-1, 2, DIM // 2), self.kernel) @ self.odd
        return kept + x @ self.down.T @ self.up.T + other.sum(1, keepdim=True)


class Network(nn.Module):
    """The root has a narrow matrix of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dtype) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean()


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network(dtype)


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def narrow(model: nn.Module) -> list[str]:
    """The names of parameters that are sharded along another dim than rows."""
    placed = [(name, p.placements[-1]) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    return [name for name, placement in placed if isinstance(placement, Shard) and placement.dim]


def by_rows() -> Any:
    """A context in which models are sharded as by earlier versions: along rows, whatever their shapes."""
    return patch.object(sharding, "sharded_dim", lambda shape, ranks: 0)
