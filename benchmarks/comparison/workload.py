"""What every system of the comparison trains: one small language model, its weights, its data and its optimizer.

The model has little computation per byte of parameters, as large models on many ranks have, so that the links decide.
All of its tensors have a first dimension that small powers of two divide: sharding pads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SGD_RATE = 10  # times AdamW's learning rate; with much more, rounding errors grow from step to step
SYMBOLS = 64  # tokens that occur in the data; the loss falls towards what is left to guess, the first token of each row


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and its data; equal workloads give equal weights and equal batches in every process."""

    layers: int = 8
    width: int = 128
    heads: int = 4
    vocabulary: int = 2048
    sequence_length: int = 32
    micro_batch: int = 1
    seed: int = 1
    learning_rate: float = 1e-3  # AdamW's

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.vocabulary < SYMBOLS:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least {SYMBOLS}")


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_forward_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden))
        return hidden + self.feed_forward_out(F.gelu(self.feed_forward_in(self.feed_forward_norm(hidden))))

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        projected = self.query_key_value(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [batch, heads, length, width / heads]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))


class LanguageModel(nn.Module):
    """A decoder whose forward pass returns the mean loss of predicting each next token."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.tokens = nn.Embedding(workload.vocabulary, workload.width)
        self.positions = nn.Embedding(workload.sequence_length, workload.width)
        self.blocks = nn.ModuleList(Block(workload.width, workload.heads) for _ in range(workload.layers))
        self.norm = nn.LayerNorm(workload.width)
        self.head = nn.Linear(workload.width, workload.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # tokens: [batch, sequence_length + 1]
        hidden = self.tokens(inputs) + self.positions.weight  # [batch, sequence_length, width]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(workload: Workload) -> nn.Module:
    """The model in fp32 on the CPU, with the same weights in every process; the process's own generator stays as is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        model = LanguageModel(workload)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return model


def parameter_bytes(workload: Workload) -> int:
    """Bytes of the model's parameters in fp32."""
    return sum(parameter.numel() * parameter.element_size() for parameter in build_model(workload).parameters())


def micro_batch(workload: Workload, *, step: int, micro_step: int, rank: int) -> Tensor:
    """Tokens of one rank's micro-step, ``[micro_batch, sequence_length + 1]``; every rank's differ.

    Args:
        workload: Sizes and seed.
        step: Optimizer steps since training began, over all phases.
        micro_step: Within the optimizer step.
        rank: Rank in the job.
    """
    successor = torch.randperm(SYMBOLS, generator=_generator(workload.seed))
    tokens = torch.empty(workload.micro_batch, workload.sequence_length + 1, dtype=torch.long)
    generator = _generator(workload.seed, step + 1, micro_step, rank)
    tokens[:, 0] = torch.randint(SYMBOLS, (workload.micro_batch,), generator=generator)
    for position in range(workload.sequence_length):
        tokens[:, position + 1] = successor[tokens[:, position]]
    return tokens


def make_optimizer(workload: Workload, parameters: Iterable[nn.Parameter], *, name: str) -> torch.optim.Optimizer:
    """The optimizer called ``name`` in a plan: ``"sgd"`` or ``"adamw"``.

    Raises:
        ValueError: If the name is another.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=SGD_RATE * workload.learning_rate)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=workload.learning_rate)
    raise ValueError(f'optimizer={name!r} is not one of "sgd", "adamw"')


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 100_003 + number  # a prime above any step, micro-step or rank, so that no two seeds meet
    return torch.Generator().manual_seed(seed % 2**63)
