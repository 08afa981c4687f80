"""Small models with awkward shapes: no dimension divides by a number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

VOCAB = 11


class Block(nn.Module):
    """A residual block with a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim + 1)
        self.down = nn.Linear(2 * dim + 1, dim)
        self.register_buffer("scale", torch.full((dim,), 0.9))

    def reset_parameters(self) -> None:
        """Make what a meta device forgot."""
        self.scale.fill_(0.9)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, seq, dim] -> same
        return hidden * self.scale + self.down(torch.tanh(self.up(hidden)))


class TinyLM(nn.Module):
    """A language model of blocks with tied embedding and head, which the root holds."""

    def __init__(self, *, dim: int = 7, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, seq] -> []
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class OneBlock(TinyLM):
    """A model of one block, which is a unit beside the root."""

    _no_split_modules = ("Block",)  # or a list of one would not be taken for a list of blocks

    def __init__(self) -> None:
        super().__init__(layers=1)


class TinyModule(pl.LightningModule):
    """An ordinary LightningModule around :class:`TinyLM`, built in ``__init__``, trained with SGD."""

    def __init__(self, *, lr: float = 0.1, layers: int = 2, kind: Callable[[], TinyLM] | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.net = kind() if kind else TinyLM(layers=layers)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader_of_tokens(count: int = 16, *, batch_size: int = 2, seed: int = 0) -> DataLoader[Any]:
    """Batches of random tokens; Lightning splits them over the ranks."""
    return DataLoader(tokens(count, seed=seed), batch_size=batch_size)


def tokens(count: int, *, length: int = 6, seed: int = 0) -> Tensor:
    """Random tokens of shape ``[count, length]``, the same for the same seed."""
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


DIM, LAYERS, BYTES = 16, 2, 4


BLOCK_NUMEL = DIM * DIM


MODEL_BYTES = (LAYERS + 1) * BLOCK_NUMEL * BYTES  # the root holds as much as a block


class Stack(nn.Module):
    """Equal square layers, so that no shard needs padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM, bias=False)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()
