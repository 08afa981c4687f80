"""Plans and rehearsals in ``"16-mixed"``: the bytes and the memory of ``"bf16-mixed"``, in float16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import Topology
from lightning_mics.planning import measure_workload, rehearse
from tests.support.scaled import layers, samples

BATCH = samples(0, 0, 0)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def sgd_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)


@pytest.mark.rehearsal
def test_float16_takes_what_bfloat16_does() -> None:
    of = {p: measure_workload(layers, BATCH, samples=2, loss=loss, precision=p) for p in ("bf16-mixed", "16-mixed")}
    assert (of["16-mixed"].gathered_dtype, of["16-mixed"].reduce_dtype) == (torch.float16, torch.float32)
    assert replace(of["16-mixed"], gathered_dtype=torch.bfloat16) == of["bf16-mixed"]


@pytest.mark.rehearsal
def test_a_rehearsal_gathers_in_float16_and_reduces_in_float32() -> None:
    topology = Topology(world_size=8, ranks_per_node=2, partition_size=4)
    job: dict[str, Any] = {"loss": loss, "topology": topology, "micro_steps": 2, "make_optimizer": sgd_of}
    half, brain = (rehearse(layers, BATCH, precision=p, **job) for p in ("16-mixed", "bf16-mixed"))
    assert half.peak == brain.peak
    sizes = [ran.collective.total_bytes for ran in half.ran]
    assert sizes == [*[ran.collective.total_bytes for ran in brain.ran], 4]
    assert (half.ran[-1].collective.ranks, half.ran[-1].collective.kind) == (8, "all_reduce")  # on an overflow
    dtypes = {(ran.collective.kind, ran.collective.dtype) for ran in half.ran if ran.micro_step}
    assert ("all_gather", torch.float16) in dtypes
    assert {dtype for kind, dtype in dtypes if kind != "all_gather"} == {torch.float32}
