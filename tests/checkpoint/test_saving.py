"""What saving a checkpoint leaves on disk, also where it fails or replaces something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_mics import checkpoint
from lightning_mics.checkpoint import saving
from tests.support.checkpoints import (
    SHARDS,
    is_same,
    load_into,
    raising,
    save_file,
    save_shards,
    sharded_model,
    weights_of,
)
from tests.support.forked import run_ranks


def _listing(path: Path) -> list[str]:
    dist.barrier()
    names = sorted(entry.name for entry in path.iterdir())
    dist.barrier()
    return names


def _overwrite(folder: Path) -> dict[str, Any]:
    path, model = folder / "a" / "b.ckpt", sharded_model()
    facts: dict[str, Any] = {}
    save_shards(path, model)
    facts["fresh"] = _listing(path)
    if dist.get_rank() == 0:
        (path / "__7_0.distcp").write_bytes(b"of a larger world")
        (path / "notes.txt").write_text("mine")
        (path / "runs").mkdir()
        (path / "runs" / "log.csv").write_text("mine too")
    save_shards(path, model)
    facts["overwritten"] = _listing(path)
    facts["beside"] = _listing(path.parent)
    facts["kept"] = (path / "runs" / "log.csv").read_text()
    if dist.get_rank() == 0:
        (folder / "file").write_text("a full file")
        (folder / "last").symlink_to(path)
    dist.barrier()
    save_shards(folder / "file", model)
    facts["instead of a file"] = _listing(folder / "file")
    save_shards(folder / "last", model)
    facts["instead of a link"] = ((folder / "last").is_symlink(), _listing(folder / "last"), _listing(path))
    return facts


@pytest.fixture(scope="module")
def overwritten(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, _overwrite, tmp_path_factory.mktemp("overwrite"))[0]


def test_a_checkpoint_is_one_file_of_shards_per_rank_two_of_metadata_and_a_manifest(
    overwritten: dict[str, Any],
) -> None:
    assert overwritten["fresh"] == SHARDS


def test_old_shards_go_and_foreign_files_stay(overwritten: dict[str, Any]) -> None:
    assert overwritten["overwritten"] == sorted([*SHARDS, "notes.txt", "runs"])
    assert overwritten["kept"] == "mine too"
    assert overwritten["beside"] == ["b.ckpt"]


def test_a_sharded_checkpoint_replaces_a_file_or_a_link_and_not_what_the_link_points_to(
    overwritten: dict[str, Any],
) -> None:
    assert overwritten["instead of a file"] == SHARDS
    is_link, listing, target = overwritten["instead of a link"]
    assert not is_link
    assert listing == SHARDS
    assert target == overwritten["overwritten"]


def _fail_midway(folder: Path) -> dict[str, Any]:
    path, model = folder / "ckpt", sharded_model()
    facts: dict[str, Any] = {}

    def attempt(name: str, save: Callable[[], None]) -> None:
        try:
            save()
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        restored = sharded_model(seed=1)
        facts[name, "before"] = is_same(weights_of(restored), weights_of(model))
        facts[name, "meta"] = load_into(path, restored)["meta"]
        facts[name, "after"] = is_same(weights_of(restored), weights_of(model))
        facts[name, "files"] = _listing(path)

    save_shards(path, model, meta="first")
    if dist.get_rank() == 0:
        (path / "notes.txt").write_text("mine")
    changed = sharded_model(seed=2)
    attempt("unpicklable meta", lambda: save_shards(path, changed, meta=lambda: None))
    write_shards = saving.save_shards
    saving.save_shards = raising(OSError(28, "No space left on device"))
    attempt("full disk", lambda: save_shards(path, changed, meta="second"))
    saving.save_shards = write_shards
    write = raising(OSError(28, "No space left on device"))
    if dist.get_rank() == 0:
        (path / "notes.txt").unlink()
    attempt("full file on a full disk", lambda: checkpoint.save_full(path, write=write))
    if dist.get_rank() == 0:  # killed between the two renames
        (path / "notes.txt").write_text("mine")
        path.rename(path.with_name(".ckpt.former"))
    dist.barrier()
    attempt("after a kill", lambda: save_shards(path, model, meta="third"))
    if dist.get_rank() == 0:  # killed after the second
        (folder / ".ckpt.former").mkdir()
        (folder / ".ckpt.former" / "todo.txt").write_text("mine")
        (folder / ".ckpt.former" / "meta.pt").write_text("old")
    dist.barrier()
    attempt("after a later kill", lambda: save_shards(path, model, meta="fourth"))
    facts["beside"] = _listing(folder)
    return facts


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _fail_midway, tmp_path_factory.mktemp("fail"))


@pytest.mark.parametrize("failure", ["unpicklable meta", "full disk", "full file on a full disk"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint(failures: Any, failure: str) -> None:
    for facts in failures:
        assert not facts[failure, "before"]
        assert facts[failure, "after"]
        assert facts[failure, "meta"] == "first"


def test_all_ranks_raise_when_rank_zero_cannot_write(failures: Any) -> None:
    assert all("lambda" in facts["unpicklable meta"] for facts in failures)
    for facts in failures:
        assert facts["full file on a full disk"].startswith("OSError: [Errno 28] checkpoint /")
        assert facts["full file on a full disk"].endswith(
            "/ckpt was not saved, and earlier ones are unchanged; what failed: No space left on device"
        )


def test_foreign_files_outlive_a_job_that_was_killed_while_it_replaced_a_checkpoint(failures: Any) -> None:
    assert failures[0]["after a kill", "files"] == [*SHARDS, "notes.txt"]
    assert failures[0]["after a kill", "meta"] == "third"
    assert failures[0]["after a later kill", "files"] == [*SHARDS, "notes.txt", "todo.txt"]
    assert failures[0]["beside"] == ["ckpt"]


def _full_over_directories(folder: Path) -> dict[str, Any]:
    model = sharded_model()
    facts: dict[str, Any] = {}
    save_shards(folder / "shards", model)
    save_file(folder / "shards", model)
    facts["over shards"] = (folder / "shards").is_file()
    save_shards(folder / "annotated", model)
    if dist.get_rank() == 0:
        (folder / "annotated" / "notes.txt").write_text("mine")
        (folder / "foreign").mkdir()
    dist.barrier()
    for name in ("annotated", "foreign"):
        try:
            save_file(folder / name, model)
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
        facts[name, "files"] = _listing(folder / name)
    facts["beside"] = _listing(folder)
    return facts


def test_a_full_file_replaces_a_sharded_checkpoint_and_no_directory_with_foreign_files(tmp_path: Path) -> None:
    for facts in run_ranks(2, _full_over_directories, tmp_path):
        assert facts["over shards"]
        for name in ("annotated", "foreign"):
            assert facts[name].startswith("IsADirectoryError")
            assert str(tmp_path / name) in facts[name]
        assert facts["annotated", "files"] == [*SHARDS, "notes.txt"]
        assert facts["foreign", "files"] == []
        assert facts["beside"] == ["annotated", "foreign", "shards"]
