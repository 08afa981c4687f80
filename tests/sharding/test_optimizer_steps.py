"""Models that are freed while an optimizer steps."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_mics._torch.optimizers.steps import call_after_steps, call_before_steps


class Counter:
    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.itself = self  # freed by the collector of cycles, at any time

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps.append(optimizer)


def test_calls_end_with_their_object_even_if_it_is_freed_inside_of_a_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    kept, freed = Counter(), Counter()
    for counter in (freed, kept):
        call_before_steps(counter.count)
        call_after_steps(counter.count)
    steps = freed.steps
    optimizer.step()
    collecting = register_optimizer_step_post_hook(lambda *_: gc.collect() and None)
    del freed, counter
    optimizer.step()
    optimizer.step()
    collecting.remove()
    assert kept.steps == [optimizer] * 6
    assert len(steps) < 6
