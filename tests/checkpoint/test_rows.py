"""Who writes and reads which rows: each value once, all ranks the same, and replicas hold all of it afterwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_mics import Topology, checkpoint, create_partition_groups
from lightning_mics.checkpoint.dcp import reader
from lightning_mics.checkpoint.dcp.rows import SMALLEST_BYTES, divide
from lightning_mics.checkpoint.opening import open_checkpoint
from tests.support.forked import run_ranks

SHAPES = {
    "even": (512, 64),
    "odd": (509, 33),
    "bias": (130,),
    "long": (100, 2_000),
    "one row": (1, 7),
}


def _tensors(partition_size: int, *, seed: int | None = 0) -> dict[str, DTensor]:
    """Tensors as FSDP2 shards them: rows over the partition group, the same on each replica; None fills with nan."""
    topology = Topology(world_size=dist.get_world_size(), ranks_per_node=2, partition_size=partition_size)
    mesh = create_partition_groups(topology, device_type="cpu").mesh
    generator = torch.Generator().manual_seed(seed or 0)
    tensors = {}
    for name, shape in SHAPES.items():
        whole = torch.randn(shape, generator=generator) if seed is not None else torch.full(shape, torch.nan)
        tensors[name] = distribute_tensor(whole, mesh, [Replicate(), Shard(0)][-mesh.ndim :], src_data_rank=None)
    return tensors


def _own(partition_size: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    divided = divide(_tensors(partition_size))
    return [
        (name, tuple(rows.offsets), tuple(rows.values.shape)) for name, shard in divided.items() for rows in shard.own()
    ]


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_each_row_is_one_ranks(partition_size: int) -> None:
    of_ranks = run_ranks(4, _own, partition_size)
    rows = Counter(
        (name, row)
        for own in of_ranks
        for name, offsets, shape in own
        for row in range(offsets[0], offsets[0] + shape[0])
    )
    assert rows == Counter((name, row) for name, shape in SHAPES.items() for row in range(shape[0]))


def test_small_shards_are_written_by_one_replica_and_large_ones_by_all() -> None:
    of_ranks = run_ranks(4, _own, 1)
    assert 130 * 4 < SMALLEST_BYTES < 512 * 64
    assert sum(name == "bias" for own in of_ranks for name, _, _ in own) == 1
    assert all(any(name == "even" for name, _, _ in own) for own in of_ranks)


def _save_and_load(folder: Path, saved_with: int, loaded_with: int) -> dict[str, Any]:
    """What this rank's file and reads weigh, and whether all of it came back."""
    tensors, path = _tensors(saved_with), folder / "c.ckpt"
    checkpoint.save_sharded(path, model_state=dict(tensors), optimizer_states=[], meta={})
    into, read_bytes = _tensors(loaded_with, seed=None), _count_values_read()
    open_checkpoint(path).read_into({"model": dict(into)}, weights_only=True)
    return {
        "equal": all(torch.equal(into[name].full_tensor(), tensors[name].full_tensor()) for name in tensors),
        "written": (path / f"__{dist.get_rank()}_0.distcp").stat().st_size,
        "read": sum(read_bytes),
    }


def _count_values_read() -> list[int]:
    """Bytes of tensors that this process reads from files: of a stored tensor that is taken whole, or of a part."""
    counted: list[int] = []
    load, read_part = torch.load, reader._read_part

    def count_load(file: Any, **options: Any) -> Any:
        loaded = load(file, **options)
        if isinstance(loaded, torch.Tensor) and not isinstance(loaded, FakeTensor):
            counted.append(loaded.untyped_storage().nbytes())
        return loaded

    def count_part(stored: Any, **part: Any) -> Any:
        whole_reads = len(counted)
        values = read_part(stored, **part)
        if len(counted) == whole_reads:  # else it was read whole after all, and is counted
            counted.append(values.nbytes)
        return values

    torch.load, reader._read_part = count_load, count_part
    return counted


@pytest.mark.parametrize(("saved_with", "loaded_with"), [(2, 2), (1, 1), (4, 4), (2, 4), (4, 2), (1, 4), (4, 1)])
def test_all_ranks_write_and_read_as_much_and_storage_is_read_once(
    tmp_path: Path, saved_with: int, loaded_with: int
) -> None:
    facts = run_ranks(4, _save_and_load, tmp_path, saved_with, loaded_with)
    assert all(fact["equal"] for fact in facts)
    assert sum(fact["read"] for fact in facts) == sum(4 * torch.Size(shape).numel() for shape in SHAPES.values())
    for what in ("written", "read"):
        amounts = [fact[what] for fact in facts]
        assert max(amounts) <= 1.1 * sum(amounts) / len(amounts), (what, amounts)
