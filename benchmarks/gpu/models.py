"""The models of the parts: a GPT of any size, and residual blocks without atomics, whose steps repeat bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """The size of a GPT.

    Attributes:
        layers: Number of blocks.
        width: Width of hidden states.
        vocabulary: Number of tokens.
        sequence: Tokens in a sequence.
        batch: Sequences in a micro-batch.
    """

    layers: int
    width: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def flops_of_step(self) -> float:
        """FLOPs of the mathematics of a micro-step: matrix products, attention as if no position were masked."""
        tokens = self.batch * self.sequence
        block = 24 * tokens * self.width**2 + 4 * tokens * self.sequence * self.width
        return 3 * (self.layers * block + 2 * tokens * self.width * self.vocabulary)


BILLION = Size(layers=18, width=2048, vocabulary=50304, sequence=2048, batch=8)
SMALL = Size(layers=2, width=64, vocabulary=64, sequence=16, batch=2)


class Block(nn.Module):
    """A block of GPT: attention and two linear layers, 12 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, sequence, width] -> same
        batch, sequence, width = hidden.shape
        qkv = self.qkv(self.norm_1(hidden)).view(batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [batch, heads, sequence, width / heads]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        return hidden + self.down(functional.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))


class GPT(nn.Module):
    """A GPT that returns its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.sequence, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, sequence] -> []
        hidden = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Residual(nn.Module):
    """A residual block of two linear layers of odd sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, width] -> same
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Stack(nn.Module):
    """Residual blocks between two linear layers; returns its loss."""

    def __init__(self, width: int = 33, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(layers))
        self.last = nn.Linear(width, 5)

    def forward(self, samples: Tensor) -> Tensor:  # [batch, width] -> []
        hidden = self.first(samples)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden).square().mean()
