"""Scaled losses on sharded models: the scales and weights of one process, whatever is reduced where and when."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.sharding.optimizers.overflow import scale_with_all_ranks, skipped_steps
from lightning_mics.sharding.shard_model import mixed_precision_policy
from tests.support.campaign import campaign
from tests.support.forked import run_cases
from tests.support.recorded import RecordCollectives
from tests.support.scaled import (
    Trained,
    assert_as_trained,
    fused,
    layers,
    note,
    samples,
    scaler,
    train_alone,
    unsharded,
)
from tests.support.scaled import sgd as plain

FLAT = CommunicationOptions(hierarchical=False)


LONG: dict[str, Any] = {"steps": 40}


SHORT: dict[str, Any] = {"steps": 6, "micro_steps": 2}


TRAININGS: dict[str, tuple[int, CommunicationOptions, dict[str, Any]]] = {  # partition size, options, what is trained
    "many steps": (2, FLAT, LONG),
    "flat": (4, FLAT, SHORT),
    "replicas of a rank": (1, FLAT, SHORT),
    "in two stages": (4, CommunicationOptions.PAPER, SHORT),
    "on nodes": (4, CommunicationOptions.NODE, SHORT),
    "on ranks": (4, CommunicationOptions.RANK, SHORT),
    "on ranks, with replicas": (2, CommunicationOptions.RANK, SHORT),
    "hop 2 in every micro-step": (2, CommunicationOptions(two_hop=False), SHORT),
    "clipped": (2, CommunicationOptions.NODE, {**SHORT, "clip": 0.1}),
    "fused": (2, CommunicationOptions.NODE, {**SHORT, "make_optimizer": fused}),
}


LONGER = {"200 steps": (2, FLAT, {"steps": 200})}  # of the campaign


NAMES = [*TRAININGS, *map(campaign, LONGER)]


WATCHED = (3, 4, 5)  # steps by which ranks need not meet to agree on what comes next


INJECTED: dict[str, Any] = {"steps": 4, "overflows_at": (2,)}


def train(
    partition_size: int,
    options: CommunicationOptions,
    *,
    steps: int,
    micro_steps: int = 1,
    clip: float | None = None,
    make_optimizer: Any = plain,
    overflows_at: tuple[int, ...] = (),
    on_rank: int = 3,
    where: str = "loss",
) -> dict[str, Any]:
    """Train on four ranks; one of them has an overflow of its own in some steps."""
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=partition_size)
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=options.hierarchical)
    model, own, trained = layers(), scaler(), Trained()
    schedule = shard_model(model, groups, communication=options, mixed_precision=mixed_precision_policy("16-mixed"))
    scale_with_all_ranks(own)
    optimizer = make_optimizer(model.parameters())
    changed, agreements = [], []
    for step in range(steps):
        injects = step in overflows_at and dist.get_rank() == on_rank
        for micro_step in range(micro_steps):
            with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(samples(step, micro_step, dist.get_rank()))
                own.scale(loss * (torch.inf if injects and where == "loss" else 1 / micro_steps)).backward()
        if injects and where == "gradient":
            model.last.weight.grad.to_local().view(-1)[-1] = torch.nan
        before, weights = own.get_scale(), [p.to_local().clone() for p in model.parameters()]
        recorded = RecordCollectives()
        with recorded if step in WATCHED else nullcontext():
            own.unscale_(optimizer)
            agreed = len(recorded.seen)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            clipped = len(recorded.seen)
            own.step(optimizer)
            own.update()
        if step in WATCHED:
            assert len(recorded.seen) == clipped
            agreements.append([(each.kind, each.ranks, each.nbytes) for each in recorded.seen[:agreed]])
        optimizer.zero_grad()
        note(trained, step, before, own.get_scale())
        changed.append(any((p.to_local() != old).any() for p, old in zip(model.parameters(), weights, strict=True)))
    trained.weights = unsharded(model)
    return {
        "trained": trained,
        "changed": changed,
        "counted": skipped_steps(own),
        "state": own.state_dict(),
        "agreements": agreements,
    }


@pytest.fixture(scope="module")
def runs(in_campaign: bool) -> dict[Any, list[Any]]:
    trainings = TRAININGS | LONGER if in_campaign else TRAININGS
    cases: dict[Any, Any] = {name: partial(train, p, options, **how) for name, (p, options, how) in trainings.items()}
    for where in ("loss", "gradient"):
        cases[where] = partial(train, 2, CommunicationOptions.NODE, **INJECTED, where=where)
    cases["fused gradient"] = partial(
        train, 2, CommunicationOptions.NODE, **INJECTED, where="gradient", make_optimizer=fused
    )
    return run_cases(4, cases)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_one_process_and_weights_as_close_as_16_bits(name: str, runs: dict[Any, Any]) -> None:
    alone = train_alone(**(TRAININGS | LONGER)[name][2])
    assert 2 <= len(alone.skipped) <= len(alone.scales) / 2  # the scale has met its limit
    for of_rank in runs[name]:
        assert_as_trained(of_rank["trained"], alone)


@pytest.mark.parametrize("name", NAMES)
def test_skipped_steps_are_counted_and_leave_the_weights_alone(name: str, runs: dict[Any, Any]) -> None:
    for of_rank in runs[name]:
        skipped = of_rank["trained"].skipped
        assert of_rank["counted"] == of_rank["state"]["skipped_steps"] == len(skipped)
        assert [step for step, changed in enumerate(of_rank["changed"]) if not changed] == skipped


@pytest.mark.parametrize("where", ["loss", "gradient", "fused gradient"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(where: str, runs: dict[Any, Any]) -> None:
    how = {**INJECTED, "make_optimizer": fused} if where.startswith("fused") else INJECTED
    alone = train_alone(**how)
    assert 2 in alone.skipped
    assert 2 not in train_alone(**{**how, "overflows_at": ()}).skipped
    for of_rank in runs[where]:
        assert not of_rank["changed"][2]
        assert_as_trained(of_rank["trained"], alone)


@pytest.mark.parametrize("name", NAMES)
def test_overflows_are_agreed_on_by_four_bytes_per_step(name: str, runs: dict[Any, Any]) -> None:
    for of_rank in runs[name]:
        assert of_rank["agreements"] == [[("all_reduce", (0, 1, 2, 3), 4)]] * len(WATCHED)
