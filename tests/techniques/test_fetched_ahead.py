"""Whatever happens between gathers, units that are fetched ahead are never outdated, and never fetched twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mics import CommunicationOptions
from tests.support.beside_ddp import unsharded_state
from tests.support.fetched_ahead import WIDTHS, Job, counted_fetches, samples_of
from tests.support.forked import run_cases

BLOCKS = len(WIDTHS)


def change_weights_in_forward(job: Job) -> None:
    """Weights of each block change in a forward of the block before it, after they were fetched."""

    @torch.no_grad()
    def change(index: int) -> None:
        for parameter in job.model.blocks[index + 1].parameters():
            parameter.mul_(0.9)

    for index in range(BLOCKS - 1):
        job.model.blocks[index].register_forward_hook(lambda *_, index=index: change(index))
    steady(job)


def evaluate(job: Job) -> None:
    def between() -> None:
        with torch.no_grad():
            job.loss()
            job.loss()

    for _ in range(3):
        job.window(2, between)
        with job.schedule.cached_weights(), torch.inference_mode():
            job.loss()


def change_memory_between(job: Job) -> None:
    def between() -> None:
        job.model.reshard()
        for parameter in job.model.parameters():
            parameter.to_local().detach().numpy()[:] *= 0.9
        job.schedule.invalidate_cache()
        with torch.no_grad():
            job.loss()

    for _ in range(4):
        job.window(1, between)
        between()


def drop_layers(job: Job) -> None:
    for step in range(6):
        job.model.used = [index for index in range(BLOCKS) if (index + step) % 3]
        steady(job, windows=1)
        job.model.used = list(range(BLOCKS))
        if step % 2:
            steady(job, windows=2)


def leave_out_what_was_expected(job: Job) -> None:
    steady(job)
    job.model.used = [0, 3, 3, 1]
    steady(job, windows=1)
    job.model.used = [0]
    steady(job)


def raise_in_forward(job: Job) -> None:
    for abandoned in (False, True):
        steady(job)

        def fail(*_: Any) -> None:
            raise ValueError("in forward")

        handle = job.model.blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="in forward"):
            job.loss()
        handle.remove()
        if abandoned:
            job.schedule.window.abandon()
        steady(job)


def use_by_hand(job: Job) -> None:
    def between() -> None:
        job.model.blocks[1].unshard()
        job.model.blocks[2].unshard(async_op=True).wait()
        job.model.blocks[1].reshard()
        job.model.blocks[3](samples_of(0, 0)).sum().backward()
        nn.functional.linear(samples_of(0, 0), job.model.blocks[0][0].weight)

    steady(job)
    job.window(2, between)
    steady(job, windows=1)
    job.model.blocks[0].register_forward_pre_hook(lambda *_: job.model.blocks[2].unshard())
    steady(job)


def run_forward_twice(job: Job) -> None:
    for _ in range(4):
        with job.schedule.micro_step(boundary=True):
            (job.loss() + job.loss()).backward()
        job.step()


def optimize_manually(job: Job) -> None:
    parts = [list(job.model.blocks[:2].parameters()), list(job.model.blocks[2:].parameters())]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    for turn in range(6):
        for index, part in enumerate(parts):
            for parameter in part:
                parameter.requires_grad_(index == turn % 2)
        with job.schedule.micro_step(boundary=True):
            loss = job.loss()
            job.schedule.window.before_backward()
            loss.backward()
        optimizers[turn % 2].step()
        job.model.zero_grad()


def train_two_models(job: Job) -> None:
    other = Job(job.options)
    for _ in range(4):
        with job.schedule.micro_step(boundary=True), other.schedule.micro_step(boundary=True):
            (job.loss() + other.loss()).backward()
        job.step()
        other.step()
    job.losses += other.losses


def steady(job: Job, windows: int = 3) -> None:
    for _ in range(windows):
        job.window(micro_steps=1)


USAGES = {
    run.__name__: run
    for run in (
        change_weights_in_forward,
        evaluate,
        change_memory_between,
        drop_layers,
        leave_out_what_was_expected,
        raise_in_forward,
        use_by_hand,
        run_forward_twice,
        optimize_manually,
        train_two_models,
    )
}
IN_ALL = {"paper": CommunicationOptions.PAPER, "nodes": CommunicationOptions.NODE}


def run_usage(usage: str, options: str, ahead: int) -> dict[str, Any]:
    job = Job(replace(IN_ALL[options], inter_node_prefetch=ahead))
    with counted_fetches() as fetched:
        USAGES[usage](job)
    return {
        "losses": torch.stack(job.losses),
        "weights": unsharded_state(job.model),
        "fetched": len(fetched),
        "in flight": list(job.prefetch.fetched) if job.prefetch else [],
        "traffic": (job.schedule.traffic.by_technique(), job.collectives),
    }


USED = [(usage, "paper") for usage in USAGES]
USED += [(usage, "nodes") for usage in ("change_weights_in_forward", "evaluate")]
ONCE_TOO_OFTEN = ("change_weights_in_forward", "drop_layers", "leave_out_what_was_expected", "raise_in_forward")


@pytest.fixture(scope="module")
def used() -> Any:
    """By usage, options and units ahead, what each rank of a job has seen."""
    return run_cases(4, {(*case, ahead): partial(run_usage, *case, ahead) for case in USED for ahead in (0, 1)})


@pytest.mark.parametrize(("usage", "options"), USED)
def test_every_usage_has_the_bits_that_it_has_without(usage: str, options: str, used: Any) -> None:
    for one, other in zip(used[usage, options, 1], used[usage, options, 0], strict=True):
        assert torch.equal(one["losses"], other["losses"])
        assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in other["weights"])
        assert one["fetched"] > 0
        assert one["in flight"] == []
        if usage not in ONCE_TOO_OFTEN:  # where what was expected did not happen, or weights changed
            assert one["traffic"] == other["traffic"]
