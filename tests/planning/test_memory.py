"""Memory of model states, and the partition size it leads to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mics.planning.memory import ModelSize, measure_model, smallest_partition_size

V100_BYTES = 32 * 2**30


def paper_bert(parameters: float, hidden: int, layers: int) -> ModelSize:
    """A BERT of the paper in mixed precision: 16 bytes of model states per parameter, gathered in two bytes."""
    count, block = int(parameters), 12 * hidden**2
    return ModelSize(
        parameters_bytes=4 * count,
        gradients_bytes=4 * count,
        optimizer_bytes=8 * count,
        root_bytes=2 * (count - layers * block),
        block_bytes=2 * block,
    )


@pytest.mark.parametrize(
    ("parameters", "hidden", "layers", "partition_size"),
    [(10.08e9, 2560, 127, 8), (15.03e9, 2560, 190, 16), (20.30e9, 5120, 64, 16), (50.20e9, 8192, 62, 64)],
)
def test_the_partition_sizes_of_the_paper_follow(parameters, hidden, layers, partition_size):
    size = paper_bert(parameters, hidden, layers)
    chosen = smallest_partition_size(size, world_size=128, ranks_per_node=8, capacity_bytes=V100_BYTES)
    assert chosen == partition_size


def test_a_model_that_fits_nowhere_gets_the_whole_job():
    size = paper_bert(1e12, 8192, 62)
    assert smallest_partition_size(size, world_size=16, ranks_per_node=8, capacity_bytes=V100_BYTES) == 16


def test_a_tiny_model_still_gets_a_whole_node():
    size = measure_model(nn.Linear(2, 2), [])
    assert smallest_partition_size(size, world_size=8, ranks_per_node=2, capacity_bytes=V100_BYTES) == 2


def test_sizes_are_counted_in_the_dtypes_that_are_used():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False))
    model[2].requires_grad_(False)
    with torch.device("meta"):
        model = model.to("meta")
    size = measure_model(model, [model[0], model[1]], gathered_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert size.parameters_bytes == 4 * (100 + 200 + 100)
    assert size.gradients_bytes == 4 * (100 + 200)
    assert size.optimizer_bytes == 8 * (100 + 200)
    assert size.block_bytes == 2 * 200
    assert size.root_bytes == 2 * 100
    assert size.per_rank_bytes(4) == (1600 + 1200 + 2400) / 4 + 200 + 3 * 400
