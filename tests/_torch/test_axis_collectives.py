"""Collectives along one axis of a mesh give what DTensor's redistribute gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._ops._math_ops import _NormPartial

from lightning_mics._torch.units.axis_collectives import along_axis
from tests.support.forked import run_cases

SHAPES = [(7, 3), (1, 5), (4, 2), (3, 7)]  # the second leaves a rank without rows

CASES: dict[str, tuple[list[Placement], int, Placement]] = {
    f"{name}, along {axis}": (placements, axis, to)
    for axis in (0, 1)
    for name, before, to in (
        ("rows gathered", Shard(0), Replicate()),
        ("columns gathered", Shard(1), Replicate()),
        ("sum scattered in rows", Partial(), Shard(0)),
        ("sum scattered in columns", Partial(), Shard(1)),
        ("sum", Partial(), Replicate()),
        ("mean", Partial("avg"), Replicate()),
        ("norm", _NormPartial(2), Replicate()),
        ("nothing to do", Shard(0), Shard(0)),
    )
    for placements in ([before, Replicate()] if axis == 0 else [Replicate(), before],)
}


def moved(case: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each shape the new local values, and those that DTensor gives."""
    placements, axis, to = CASES[case]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    after = [*placements[:axis], to, *placements[axis + 1 :]]
    results = []
    for rows, columns in SHAPES:
        values = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
        sharded = next((each for each in placements if isinstance(each, Shard)), None)
        if sharded is not None:  # this rank's part
            parts = [*values.chunk(2, sharded.dim), values.narrow(sharded.dim, 0, 0)]
            values = parts[mesh.get_local_rank(axis)]
        else:
            values = values + mesh.get_rank()
        before: Any = DTensor.from_local(
            values, mesh, placements, run_check=False, shape=torch.Size((rows, columns)), stride=(columns, 1)
        )
        expected = before.redistribute(mesh, after).to_local()
        results.append((along_axis(before.to_local(), before._spec, axis, placements, to), expected))
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    return run_cases(4, {case: partial(moved, case) for case in CASES})


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_redistribute(case: str, results: Any) -> None:
    for of_rank in results[case]:
        for found, expected in of_rank:
            assert found.shape == expected.shape
            assert found.is_contiguous()
            assert torch.equal(found, expected)
