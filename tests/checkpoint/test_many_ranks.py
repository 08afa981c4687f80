"""A checkpoint of four ranks, as each of 512 reads it, alone under a process group without peers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics import Topology, checkpoint, create_partition_groups
from lightning_mics.checkpoint.dcp.load_planner import SafePlanner
from lightning_mics.checkpoint.dcp.reader import SafeReader
from tests.support.forked import run_ranks

ROWS, WIDTH, WORLD_SIZE, PARTITION_SIZE = 128 * 40, 128, 512, 128


POSITIONS = (0, 63, 127)  # whose shards are looked at, on all replicas


def _whole() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def _save(folder: Path) -> None:
    mesh = create_partition_groups(Topology(world_size=4, ranks_per_node=2, partition_size=2), device_type="cpu").mesh
    weight = distribute_tensor(_whole(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    checkpoint.save_sharded(folder / "c.ckpt", model_state={"weight": weight}, optimizer_states=[], meta={})


def _read(folder: Path, ranks: list[int]) -> list[torch.Tensor]:
    """The shard of each rank, with what the rank itself has read, and nan where its replicas would send the rest."""
    shards = []
    for rank in ranks:
        dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())
        mesh = init_device_mesh("cpu", (WORLD_SIZE // PARTITION_SIZE, PARTITION_SIZE))
        shard = torch.full((ROWS // PARTITION_SIZE, WIDTH), torch.nan)
        weight = DTensor.from_local(shard, mesh, [Replicate(), Shard(0)], run_check=False)
        state = {"model": {"weight": weight}}
        planner = SafePlanner(weights_only=True)
        load_shards(state, storage_reader=SafeReader(folder / "c.ckpt"), planner=planner, no_dist=True)
        shards.append(weight.to_local())
        dist.destroy_process_group()
    return shards


def test_each_of_512_ranks_reads_its_own_rows_of_a_checkpoint_of_four(tmp_path: Path) -> None:
    run_ranks(4, _save, tmp_path)
    replicas = range(WORLD_SIZE // PARTITION_SIZE)
    ranks = [replica * PARTITION_SIZE + position for position in POSITIONS for replica in replicas]
    (shards,) = run_ranks(1, _read, tmp_path, ranks, init_group=False)
    for index, position in enumerate(POSITIONS):
        of_position = torch.stack(shards[index * len(replicas) : (index + 1) * len(replicas)])  # [replica, row, width]
        assert of_position.isnan().all(dim=2).sum(dim=0).eq(len(replicas) - 1).all()  # each row was read by one replica
        count = ROWS // PARTITION_SIZE
        expected = _whole()[position * count : (position + 1) * count]
        assert torch.equal(of_position.nan_to_num().sum(dim=0), expected)
