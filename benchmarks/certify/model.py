"""The module that mutants are to be found with, and the options under which it trains.

It has what schedules treat apart: a root with its own parameters, tied or not; two blocks, of which one is skipped in
some micro-steps and in one whole window; rows that no number of ranks divides; a frozen parameter; buffers; dropout;
two groups of AdamW; a schedule that computes learning rates from the first ones and the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HIDDEN, TOKENS, SAMPLES = 11, 6, 10, 5, 2
RANKS, MICRO_STEPS, WINDOWS = 4, 2, 4
SKIPS = (False, True, True, False, False, False, True, True)  # of each micro-step: whether block 1 is skipped


class Block(nn.Module):
    """A residual block of two linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:  # [samples, tokens, width] -> same
        inner = functional.gelu(self.up(self.norm(hidden)))
        return hidden + self.down(functional.dropout(inner, 0.1, self.training))


class Small(pl.LightningModule):
    """A language model of two blocks.

    Args:
        tied: Whether the head is the embedding.
        running: Whether each rank changes a buffer from its own samples.
    """

    def __init__(self, *, tied: bool = False, running: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) / 10, requires_grad=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(WIDTH) / 10)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.running = running

    def forward(self, tokens: Tensor, skip: bool) -> Tensor:  # [samples, tokens] -> []
        hidden = self.embed(tokens) + self.positions + self.offset
        if self.running:
            hidden = hidden - self.mean
            if self.training:
                self.mean.lerp_(hidden.detach().mean((0, 1)), 0.1)
        for number, block in enumerate(self.blocks):
            if not (skip and number):
                hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self(batch["tokens"], batch["skip"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self(batch["tokens"], batch["skip"])

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.9)},
            {"params": [p for p in trained if p.ndim == 1], "lr": 0.02, "weight_decay": 0.0, "betas": (0.7, 0.95)},
        ]
        optimizer = torch.optim.AdamW(groups, eps=2e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Falling())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Falling:
    """Share of the first learning rate after some steps; a schedule saves the attributes of such an object."""

    def __init__(self) -> None:
        self.share = 0.7

    def __call__(self, steps: int) -> float:
        return float(self.share**steps)


def batches() -> list[dict[str, Any]]:
    """Micro-batches of all ranks and windows; ranks skip the same block in the same micro-step."""
    generator = torch.Generator().manual_seed(7)
    return [
        {"tokens": torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=generator), "skip": SKIPS[number // RANKS]}
        for number in range(RANKS * MICRO_STEPS * WINDOWS)
    ]


@dataclass(frozen=True)
class Case:
    """A set of options, and which trainings are made under it.

    Attributes:
        name: Name of the case.
        options: Options of the strategy.
        module: Function that returns the module.
        trainings: Names of the trainings, each after those whose checkpoint it resumes; see
            :class:`~benchmarks.certify.trials.Trials`.
    """

    name: str
    options: Mapping[str, Any]
    module: partial[Small]
    trainings: tuple[str, ...] = field(default=("job", "resumed", "on 2 ranks"))

    def __str__(self) -> str:
        return self.name


NODE, ALL = 2, 4  # ranks in a partition group, on two nodes of two ranks
CASES = (
    Case(
        "all nodes, once per step on nodes",
        {"partition_size": ALL, "cache_parameters": "node", "accumulate_gradients": "node"},
        partial(Small),
        ("job", "resumed", "on 2 ranks", "control", "full"),
    ),
    Case(
        "nodes, as in the paper",
        {"partition_size": NODE, "cache_parameters": "never", "accumulate_gradients": "shard"},
        partial(Small),
    ),
    Case(
        "nodes, once per step on ranks",
        {"partition_size": NODE, "cache_parameters": "rank", "accumulate_gradients": "rank"},
        partial(Small, tied=True),
        ("job", "resumed", "on 2 ranks", "control", "full"),
    ),
    Case(
        "all nodes, hierarchical",
        {"partition_size": ALL, "cache_parameters": "never", "accumulate_gradients": "shard"},
        partial(Small, tied=True),
        ("job", "resumed"),
    ),
    Case(
        "all nodes, prefetch, running buffers",
        {
            "partition_size": ALL,
            "cache_parameters": "never",
            "accumulate_gradients": "node",
            "inter_node_prefetch": 1,
        },
        partial(Small, running=True),
        ("job", "resumed"),
    ),
)
