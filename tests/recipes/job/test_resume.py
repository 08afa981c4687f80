from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.storage.manifest import FileFacts, Manifest
from recipes.job.resume import SavedRun, find_saved_runs, steps_to_reach


def save(path: Path, *, step: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "val_loss": 3.5}, path)
    return path


def test_without_resume_there_is_nothing_to_continue(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt")
    assert find_saved_runs(None, checkpoint_dir=tmp_path) == []


def test_last_is_found_sharded_or_full(tmp_path: Path) -> None:
    save(tmp_path / "full" / "last.ckpt")
    save(tmp_path / "sharded" / "last.ckpt" / "meta.pt")
    for kind in ("full", "sharded"):
        runs = find_saved_runs("last", checkpoint_dir=tmp_path / kind)
        assert runs == [SavedRun(path=tmp_path / kind / "last.ckpt", step=7, val_loss=3.5)]


def test_last_is_followed_by_those_before_it_and_damaged_ones_are_told_of(tmp_path: Path) -> None:
    for name, step in {"step_5.ckpt": 5, "last.ckpt": 7, "step_7.ckpt": 7, "step_9.ckpt": 9}.items():
        meta = save(tmp_path / name / "meta.pt", step=step)
        Manifest.now({"meta.pt": FileFacts.of(meta)}, world_size=1).write(meta.parent)
    (tmp_path / "step_9.ckpt" / "meta.pt").write_bytes(b"cut")
    told: list[str] = []
    runs = find_saved_runs("last", checkpoint_dir=tmp_path, say=told.append)
    assert [run.path.name for run in runs] == ["last.ckpt", "step_7.ckpt", "step_5.ckpt"]
    assert len(told) == 1 and "step_9.ckpt is corrupted: meta.pt has 3 of" in told[0]
    for name in ("step_5.ckpt", "last.ckpt", "step_7.ckpt"):
        (tmp_path / name / "meta.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"is corrupted: meta\.pt"):
        find_saved_runs("last", checkpoint_dir=tmp_path)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "step_7.ckpt")
    assert [run.path for run in find_saved_runs(str(path), checkpoint_dir=tmp_path / "elsewhere")] == [path]


def test_last_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"resume=last: there is no checkpoint in {tmp_path} yet"):
        find_saved_runs("last", checkpoint_dir=tmp_path)


def test_auto_starts_afresh_where_last_finds_nothing(tmp_path: Path) -> None:
    assert find_saved_runs("auto", checkpoint_dir=tmp_path) == []


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume=nowhere\.ckpt: there is no such checkpoint; use resume=last"):
        find_saved_runs("nowhere.ckpt", checkpoint_dir=tmp_path)


@pytest.mark.parametrize(("step", "reached"), [(None, 100), (40, 100), (100, 200), (150, 250)])
def test_a_finished_run_goes_on_for_as_many_steps_again(tmp_path: Path, step: int | None, reached: int) -> None:
    saved = None if step is None else SavedRun(path=tmp_path, step=step, val_loss=None)
    assert steps_to_reach(100, saved) == reached
