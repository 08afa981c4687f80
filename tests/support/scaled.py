"""Training in float16 with a scaled loss, in one process and on ranks; scales grow until gradients overflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

INIT_SCALE, GROWTH_INTERVAL, LR = 2.0**18, 2, 0.05


class Layers(nn.Module):
    """A stack of operations that CPUs have in float16, with sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(7, 3)

    def forward(self, batch: Tensor) -> Tensor:  # [batch, 5] -> []
        hidden = self.first(batch)
        for block in self.blocks:
            hidden = block(hidden)
        return (self.last(hidden).float() - batch[:, :3].sin()).square().mean()


def layers() -> Layers:
    torch.manual_seed(3)
    return Layers()


def samples(step: int, micro_step: int, rank: int) -> Tensor:
    """The batch of one rank in one micro-step: [2, 5]."""
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank))


def scaler(scale: float = INIT_SCALE) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=GROWTH_INTERVAL)


@dataclass
class Trained:
    """What a training has left.

    Attributes:
        scales: Scale after each step.
        skipped: Steps whose update was skipped.
        weights: Unsharded weights at the end, by name.
    """

    scales: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def unsharded(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def train_alone(
    *,
    steps: int,
    micro_steps: int = 1,
    ranks: int = 4,
    clip: float | None = None,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    overflows_at: tuple[int, ...] = (),
) -> Trained:
    """Train one process with torch's own scaler on the samples of all ranks."""
    model, own, trained = layers(), scaler(), Trained()
    optimizer = make_optimizer(model.parameters()) if make_optimizer else sgd(model.parameters())
    for step in range(steps):
        for micro_step in range(micro_steps):
            for rank in range(ranks):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(samples(step, micro_step, rank))
                own.scale(loss / micro_steps).backward()
        for parameter in model.parameters():
            parameter.grad /= ranks  # after the backward, as ranks do: a factor in the loss would change what overflows
        if step in overflows_at:
            model.last.bias.grad.fill_(torch.inf)
        own.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = own.get_scale()
        own.step(optimizer)
        own.update()
        optimizer.zero_grad()
        note(trained, step, before, own.get_scale())
    trained.weights = unsharded(model)
    return trained


def note(trained: Trained, step: int, before: float, after: float) -> None:
    """Note a step by the scale before it and after it, which a skipped step alone lowers."""
    trained.scales.append(after)
    if after < before:
        trained.skipped.append(step)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, eps=1.0, fused=True)  # eps: or noise would decide signs


def assert_as_trained(ours: Trained, alone: Trained) -> None:
    """The same history of scales, and weights as close as 16 bits are."""
    assert ours.scales == alone.scales
    assert ours.skipped == alone.skipped
    for name, value in alone.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=0, atol=2e-3)
