"""Modules to certify: right ones, and ones whose training depends on the rank or on being sharded."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

DIM = 9


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:  # [batch, dim] -> same
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Regression(pl.LightningModule):
    """An ordinary module: blocks, dropout, a learning rate that changes in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, DIM), nn.Linear(DIM, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [batch, 5] -> [batch, 1]
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.mse_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


class Normalized(Regression):
    """A module whose ranks change a buffer from their own data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class TwoOptimizers(pl.LightningModule):
    """A module with two optimizers, optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.blocks, self.critic = nn.ModuleList(Block(5) for _ in range(2)), nn.Linear(5, 1)

    def made(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        of_blocks, of_critic = self.optimizers()
        loss = self.critic(self.made(x)).square().mean()
        of_blocks.zero_grad()
        self.manual_backward(loss)
        of_blocks.step()
        of_critic.zero_grad()
        self.manual_backward(functional.mse_loss(self.critic(x), y))
        of_critic.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.blocks.parameters(), lr=0.01), torch.optim.SGD(self.critic.parameters(), lr=0.01)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class DrawsByRank(Regression):
    """A module that adds noise from a generator of its own, seeded by rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(_rank()), dtype=torch.float64)
        return super().training_step((batch[0] + noise, batch[1]), batch_idx)


class OtherOrder(Regression):
    """A module whose rank 1 calls its blocks the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in reversed(self.blocks) if _rank() == 1 else self.blocks:
            x = block(x)
        return self.last(x)


class StartsByRank(Regression):
    """A module whose ranks add something of their own to the weights when training starts."""

    def on_fit_start(self) -> None:
        with torch.no_grad():
            weight = self.blocks[0].up.weight
            (weight.to_local() if isinstance(weight, DTensor) else weight).add_(1e-9 * _rank())


class ScalesGradients(Regression):
    """A module that divides its loss by the number of ranks, which the reduction does already."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) / self.trainer.world_size


class NormOfShards(torch.optim.SGD):
    """An optimizer that divides each gradient by its norm, that of the rank's rows alone."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if isinstance(parameter, DTensor):
                    parameter, gradient = parameter.to_local(), gradient.to_local()
                parameter.sub_(gradient / (gradient.norm() + 1e-8), alpha=group["lr"])
        return loss


class LooksAtShards(Regression):
    """A module with such an optimizer."""

    def configure_optimizers(self) -> Any:
        return NormOfShards(self.parameters(), lr=0.01)


class CountsBatches(Regression):
    """A module whose loss depends on the number of the micro-batch, which ranks count each for itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (2 if batch_idx % 2 else 1)


class NeverUses(Regression):
    """A module with a layer that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class TrainsNothing(Regression):
    """A module without an optimizer."""

    def configure_optimizers(self) -> Any:
        return None


class Dies(Regression):
    """A module whose rank 1 ends its process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if _rank() == 1:
            os._exit(3)
        return super().training_step(batch, batch_idx)


class Product(torch.autograd.Function):
    """A product of a vector and a weight, without gradients of its own operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # [dim], [dim] -> [dim]
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradients[0] * weight, gradients[0] * x


class MultipliesSamples(Regression):
    """A module that multiplies single samples by a bias of their shape, outside of the block that has it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = [Product.apply(sample, self.blocks[1].down.bias) for sample in self.first(batch[0])]
        return super().training_step(batch, batch_idx) + torch.stack(samples).mean()


class ForgetsWhenLoading(Regression):
    """A module whose hook changes what is loaded."""

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        states = checkpoint["optimizer_states"][0]["state"]
        for state in states.values():
            state["exp_avg"] = state["exp_avg"] * 0


class ForwardReturnsLoss(nn.Module):
    """A plain module whose forward returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Regression()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.net(x), y)


class NotANumber(Regression):
    """A module whose loss is not a number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.nan


def batches(count: int = 32) -> list[Any]:
    """Micro-batches of inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 5, generator=generator), torch.randn(3, 1, generator=generator)) for _ in range(count)]
