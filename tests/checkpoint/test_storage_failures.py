"""Full disks, and directories that cannot be written: all ranks say which checkpoint and why, and earlier ones stay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_mics import checkpoint
from lightning_mics.checkpoint.storage.folder import CheckpointFolder
from tests.support.forked import run_ranks

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata.tmp", "meta.pt", "manifest.json"]


WHOLE = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]


def _save(path: Path, value: float) -> None:
    """Two tensors, which rank 0 writes, and a tensor of each rank, which it writes itself."""
    state = {name: torch.full((2**18,), value) for name in ("one", "other")}
    own = {"own": torch.full((2**18,), value)}
    checkpoint.save_sharded(path, model_state=state, optimizer_states=[], meta={"value": value}, rank_state=own)


def _value(path: Path) -> tuple[float, float]:
    """What was saved, as the metadata and a weight have it."""
    model = torch.nn.Module()
    for name in ("one", "other"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2**18)))
    meta = checkpoint.load(path, model=model, optimizers=[], strict=True, weights_only=True)
    return meta["value"], model.get_parameter("other")[-1].item()


def _error(path: Path) -> str:
    try:
        _save(path, 2.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _listing(folder: Path) -> list[str]:
    dist.barrier()
    names = sorted(entry.name for entry in folder.iterdir())
    dist.barrier()
    return names


def _full_disk(folder: Path) -> dict[str, Any]:
    path, begin = folder / "a.ckpt", CheckpointFolder.begin
    _save(path, 1.0)
    facts: dict[str, Any] = {}
    for name in FILES:

        def begin_on_a_full_disk(place: CheckpointFolder, name: str = name) -> Path:
            draft = begin(place)
            (draft / name).symlink_to("/dev/full")  # the kernel's own: to write there is an error, there is no space
            return draft

        CheckpointFolder.begin = begin_on_a_full_disk  # type: ignore[method-assign]
        facts[name] = {"error": _error(path), "beside": _listing(folder), "value": _value(path)}
    CheckpointFolder.begin = begin  # type: ignore[method-assign]
    _save(path, 3.0)
    facts["next"] = (_value(path), _listing(folder), _listing(path))
    return facts


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _full_disk, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("name", FILES)
def test_all_ranks_say_that_the_disk_is_full(full_disk: Any, name: str) -> None:
    messages = [facts[name]["error"] for facts in full_disk]
    for message in messages:
        assert message.startswith("OSError: [Errno 28] checkpoint /")
        assert "a.ckpt was not saved" in message and message.endswith("No space left on device")
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_checkpoint_before_it_and_is_left_no_fuller(full_disk: Any, name: str) -> None:
    for facts in full_disk:
        assert facts[name]["value"] == (1.0, 1.0)
        assert facts[name]["beside"] == ["a.ckpt"]


def test_when_there_is_space_again_saving_goes_on(full_disk: Any) -> None:
    assert full_disk[0]["next"] == ((3.0, 3.0), ["a.ckpt"], WHOLE)


def _read_only(folder: Path) -> dict[str, Any]:
    path = folder / "a.ckpt"
    _save(path, 1.0)
    dist.barrier()
    if dist.get_rank() == 0:
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nobody: root may write anywhere
    dist.barrier()
    facts = {"error": _error(path)}
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o755)
    (folder / "file").touch()
    return {**facts, "value": _value(path), "in a file": _error(folder / "file" / "b.ckpt"), "files": _listing(folder)}


def test_a_directory_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path) -> None:
    for facts in run_ranks(2, _read_only, tmp_path):
        assert facts["error"].startswith(f"PermissionError: [Errno 13] checkpoint {tmp_path}/a.ckpt was not saved")
        assert "Permission denied" in facts["error"]
        assert facts["value"] == (1.0, 1.0)
        assert facts["in a file"].startswith("FileExistsError: ") and f"{tmp_path}/file/b.ckpt" in facts["in a file"]
        assert facts["files"] == ["a.ckpt", "file"]
