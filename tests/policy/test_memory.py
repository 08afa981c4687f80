"""Memory of model states, and the partition size it leads to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mics.policy.memory import ModelSize, measure_model, smallest_partition_size, usable_bytes

V100_BYTES = 32 * 2**30


def paper_bert(parameters: float, hidden: int, layers: int) -> ModelSize:
    """A BERT of the paper in fp16: 16 bytes of model states per parameter, gathered and reduced in two bytes."""
    count, block = int(parameters), 12 * hidden**2
    root = count - layers * block
    return ModelSize(
        states_bytes=16 * count,
        root_bytes=2 * root,
        root_reduced_bytes=2 * root,
        block_bytes=2 * block,
        block_reduced_bytes=2 * block,
        gathered_bytes=2 * count,
        reduced_bytes=2 * count,
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
    assert size.states_bytes == 4 * 400 + 4 * 300 + 8 * 300  # parameters, gradients, Adam
    assert (size.block_bytes, size.block_reduced_bytes) == (2 * 200, 4 * 200)
    assert (size.root_bytes, size.root_reduced_bytes) == (2 * 100, 4 * 100)
    assert (size.gathered_bytes, size.reduced_bytes) == (2 * 400, 4 * 300)
    assert size.per_rank_bytes(4) == 5200 / 4 + 2 * 200 + 3 * 400 + 800


def test_states_in_host_memory_are_counted_there():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False))
    model[1].requires_grad_(False)
    on_device, states, everything = (
        measure_model(model, [], offload=offload) for offload in (False, "optimizer", True)
    )
    assert (on_device.states_bytes, on_device.offloaded_bytes) == (4 * 300 + 4 * 100 + 8 * 100, 0)
    assert (states.states_bytes, states.offloaded_bytes) == (4 * 300 + 4 * 100, 16 * 100)  # with copies of a step
    assert (everything.states_bytes, everything.offloaded_bytes) == (0, 4 * 300 + 4 * 100 + 8 * 100)
    assert (states.gradients_bytes, everything.gradients_bytes) == (400, 0)
    assert states.per_rank_host_bytes(3) == 534
    assert everything.per_rank_bytes(4) == on_device.per_rank_bytes(4) - on_device.states_bytes / 4


def test_a_large_root_is_what_counts_at_the_end_of_the_backward():
    size = ModelSize(
        states_bytes=0,
        root_bytes=100,
        root_reduced_bytes=200,
        block_bytes=10,
        block_reduced_bytes=10,
        gathered_bytes=0,
        reduced_bytes=0,
    )
    assert size.per_rank_bytes(4) == 2 * 100 + 200


def test_a_block_inside_another_is_counted_once():
    inner = nn.Linear(10, 10, bias=False)
    outer = nn.Sequential(inner, nn.Linear(10, 2, bias=False))
    size = measure_model(nn.Sequential(outer, nn.Linear(2, 3, bias=False)), [inner, outer])
    assert size.block_bytes == 4 * 100
    assert size.root_bytes == 4 * 6


def test_a_gpu_reserves_bytes_for_each_rank_and_a_share() -> None:
    of_40, of_80 = usable_bytes(40 * 10**9), usable_bytes(80 * 10**9)
    assert of_40 == 36_100_000_000  # 1.5 GB, and 6 %
    assert of_80 - of_40 == 37_600_000_000
