"""The loop of the systems that leave looping to their user: s micro-steps, one optimizer step, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from benchmarks.comparison.job import Job
from benchmarks.comparison.plan import Phase


class MicroStep(Protocol):
    """What a system does around the forward and backward of one micro-step."""

    def __call__(self, *, boundary: bool) -> AbstractContextManager[None]: ...


def train_in_bare_loop(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    micro_step: MicroStep,
) -> None:
    """Train ``model`` through all phases; gradients are the mean over micro-steps (and, by the system, over ranks)."""
    for index, phase in enumerate(job.plan.phases):
        job.recorder.begin_phase(index)
        first = job.plan.first_step(index)
        for step in range(first, first + phase.all_steps):
            losses = [
                _run_micro_step(job, model, phase, step, index_of_micro_step, micro_step)
                for index_of_micro_step in range(phase.micro_steps)
            ]
            optimizer.step()
            optimizer.zero_grad()
            job.recorder.finish_step(sum(losses) / len(losses))


def _run_micro_step(
    job: Job,
    model: nn.Module,
    phase: Phase,
    step: int,
    index: int,
    micro_step: Callable[..., AbstractContextManager[None]],
) -> float:
    tokens = job.micro_batch(step=step, micro_step=index)
    with micro_step(boundary=index == phase.micro_steps - 1):
        loss = model(tokens)
        (loss / phase.micro_steps).backward()
    return loss.item()
