"""`python -m lightning_mics inspect` shows the contents of a checkpoint, and whether it is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_mics import Topology, checkpoint, create_partition_groups, shard_model
from lightning_mics.checkpoint.inspect import main
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.origin import TOPOLOGY_KEY, origin
from lightning_mics.checkpoint.storage.manifest import FileFacts, Manifest
from tests.support.forked import run_ranks
from tests.support.models import DIM, LAYERS, Stack, TinyModule
from tests.support.trainers import loader, make_trainer, mics, on_ranks

VALUES = DIM * DIM * (LAYERS + 1)


def _save(path: Path, meta: dict[str, Any]) -> None:
    model = Stack()
    groups = create_partition_groups(Topology(world_size=2, ranks_per_node=2, partition_size=2), device_type="cpu")
    schedule = shard_model(model, groups)
    optimizer = AdamW(model.parameters())
    with schedule.micro_step(boundary=True):
        model(torch.randn(2, DIM)).backward()
    optimizer.step()
    states = [optimizer_state(model, optimizer, sharded=True)]
    checkpoint.save_sharded(
        path, model_state=model.state_dict(), optimizer_states=states, meta=meta, rank_state={"torch": torch.ones(3)}
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run_ranks(2, _save, tmp_path / "a.ckpt", {"global_step": 7, "epoch": 1})
    return tmp_path / "a.ckpt"


def test_it_says_step_age_ranks_sizes_dtypes_and_that_all_is_there(path: Path, capsys: Any) -> None:
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == str(path)
    rows = dict(line.strip().split("  ", 1) for line in shown[1:])
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["step"], rows["epoch"], rows["written by"]) == ("7", "1", "2 ranks")
    assert (rows["nodes"], rows["partition groups"]) == ("not recorded", "not recorded")
    assert rows["saved"].endswith("less than a minute ago")
    assert rows["model"].startswith(f"{LAYERS + 1} tensors, {VALUES:,} values, ") and rows["model"].endswith(
        ", float32"
    )
    assert f"{2 * VALUES + LAYERS + 1:,} values" in rows["optimizer_0"]  # two moments, and a step for each parameter
    assert rows["rank states"].startswith("2 tensors, 6 values")
    assert rows["on disk"].startswith("4 files, ")
    assert rows["complete"] == "yes: sizes and checksums are as written"


@pytest.mark.parametrize(
    ("topology", "nodes", "partition_groups"),
    [
        (Topology(world_size=8, ranks_per_node=4, partition_size=2), "2 of 4 ranks", "4 of 2 ranks: 4 replicas"),
        (Topology(world_size=1, ranks_per_node=1, partition_size=1), "1 of 1 rank", "1 of 1 rank: 1 replica"),
        ({"world_size": 8}, "not recorded", "not recorded"),
        ({"world_size": 8, "ranks_per_node": 3, "partition_size": 2}, "not recorded", "not recorded"),
    ],
    ids=["eight ranks", "one rank", "a part of it", "one that cannot be"],
)
def test_it_says_the_topology_that_the_checkpoint_was_saved_with(
    tmp_path: Path, capsys: Any, topology: Any, nodes: str, partition_groups: str
) -> None:
    said = origin(nn.Linear(1, 1), topology) if isinstance(topology, Topology) else {TOPOLOGY_KEY: topology}
    run_ranks(2, _save, tmp_path / "a.ckpt", said)
    assert main([str(tmp_path / "a.ckpt")]) == 0
    shown = capsys.readouterr().out
    assert f"\n  nodes             {nodes}\n  partition groups  {partition_groups}\n" in shown


def _save_by_trainer(folder: Path) -> None:
    trainer = make_trainer(folder, strategy=mics(partition_size=4))
    trainer.fit(TinyModule(), loader())
    trainer.save_checkpoint(folder / "a.ckpt")


def test_a_trainer_notes_the_topology(tmp_path: Path, capsys: Any) -> None:
    on_ranks(_save_by_trainer, tmp_path)
    assert main([str(tmp_path / "a.ckpt")]) == 0
    assert "2 of 2 ranks\n  partition groups  1 of 4 ranks: 1 replica\n" in capsys.readouterr().out


def test_damage_is_named_and_ends_with_an_error(path: Path, capsys: Any) -> None:
    os.truncate(path / "__1_0.distcp", 7)
    assert main([str(path)]) == 1
    assert "complete          no: __1_0.distcp has 7 of " in capsys.readouterr().out
    (path / "manifest.json").write_text("{")
    assert main([str(path)]) == 1
    assert "is corrupted: manifest.json" in capsys.readouterr().err


def test_what_would_run_code_is_not_read(path: Path, capsys: Any) -> None:
    torch.save({"global_step": os.getpid}, path / "meta.pt")
    files = {name: FileFacts.of(path / name) for name in Manifest.read(path).files}
    Manifest.now(files, world_size=2).write(path)
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "meta.pt holds posix.getpid, which is neither plain data nor a tensor" in shown
    assert "step              not recorded" in shown


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a sharded checkpoint" in capsys.readouterr().err
