from __future__ import annotations

import pytest
import torch

from benchmarks.comparison.plan import Phase, Plan
from benchmarks.comparison.workload import (
    Workload,
    build_model,
    make_optimizer,
    micro_batch,
    parameter_bytes,
)

SMALL = Workload(layers=2, width=16, heads=2, vocabulary=64, sequence_length=8)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    first = build_model(SMALL).state_dict()
    assert torch.equal(torch.rand(1), expected_next), "the process's own generator moved"
    torch.manual_seed(4)
    second = build_model(SMALL).state_dict()
    other = build_model(Workload(**{**vars(SMALL), "seed": 2})).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_micro_batches_repeat_and_differ_by_step_micro_step_and_rank() -> None:
    workload = Workload(micro_batch=4)
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    batches = [micro_batch(workload, step=step, micro_step=m, rank=rank) for step, m, rank in places]
    again = [micro_batch(workload, step=step, micro_step=m, rank=rank) for step, m, rank in places]
    assert all(torch.equal(batch, repeated) for batch, repeated in zip(batches, again, strict=True))
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(places)
    assert batches[0].shape == (4, workload.sequence_length + 1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_data_can_be_learned(name: str) -> None:
    model = build_model(SMALL)
    optimizer = make_optimizer(SMALL, model.parameters(), name=name)
    losses = []
    for step in range(40):
        loss = model(micro_batch(SMALL, step=step, micro_step=0, rank=0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])


def test_eight_ranks_shard_the_default_model_without_padding() -> None:
    model = build_model(Workload())
    assert all(parameter.size(0) % 8 == 0 for parameter in model.parameters())
    assert parameter_bytes(Workload()) == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="heads=3 does not divide width=16"):
        Workload(width=16, heads=3)
    with pytest.raises(ValueError, match="vocabulary=8 must be at least 64"):
        Workload(vocabulary=8)
    with pytest.raises(ValueError, match='optimizer=\'lion\' is not one of "sgd", "adamw"'):
        make_optimizer(SMALL, [], name="lion")
    with pytest.raises(ValueError, match="phase 'a': micro_steps=0 must be at least 1"):
        Phase(name="a", rate_mbit=None, micro_steps=0, warmup_steps=0, steps=1)


def test_a_plan_survives_json_and_counts_steps_over_phases() -> None:
    phases = tuple(
        Phase(name=str(s), rate_mbit=rate, micro_steps=s, warmup_steps=2, steps=3) for s, rate in ((1, None), (4, 50.0))
    )
    plan = Plan(workload=SMALL, ranks_per_node=2, optimizer="sgd", phases=phases)
    assert Plan.from_json(plan.to_json()) == plan
    assert [plan.first_step(index) for index in range(2)] == [0, 5]
