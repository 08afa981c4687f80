from __future__ import annotations

import multiprocessing
import os
import time
from errno import ENOLCK
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recipes.data.token_cache import ABANDONED_SECONDS, cache_folder, prepare_once

FORK = multiprocessing.get_context("fork")


def fill(draft: Path) -> None:
    (draft / "a").write_text("a")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_of_eight_processes_at_once_one_does_the_work(tmp_path: Path) -> None:
    started, done = FORK.Barrier(8), FORK.SimpleQueue()

    def fill_slowly(draft: Path) -> None:
        fill(draft)
        done.put(os.getpid())

    def prepare() -> None:
        started.wait()
        prepare_once(tmp_path / "cache", fill_slowly)
        assert (tmp_path / "cache" / "a").read_text() == "a"

    processes = [FORK.Process(target=prepare) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert done.get() in [process.pid for process in processes]
    assert done.empty()
    assert visible(tmp_path) == ["cache"]


def test_who_waits_says_for_what_and_a_killed_holder_blocks_nobody(tmp_path: Path) -> None:
    filling, waiting = FORK.Event(), FORK.SimpleQueue()

    def never_done(_draft: Path) -> None:
        filling.set()
        FORK.Event().wait()

    holder = FORK.Process(target=prepare_once, args=(tmp_path / "cache", never_done))
    holder.start()
    assert filling.wait(60)
    waiter = FORK.Process(target=prepare_once, args=(tmp_path / "cache", fill), kwargs={"say": waiting.put})
    waiter.start()
    assert "Waiting for another process that prepares" in waiting.get()
    assert waiter.is_alive() and not (tmp_path / "cache").exists()
    holder.kill()
    waiter.join(60)
    assert waiter.exitcode == 0
    assert "cache" in visible(tmp_path)


def test_what_a_killed_holder_has_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".cache.old", ABANDONED_SECONDS + 60), (".cache.new", 60)):
        draft = tmp_path / name / "draft"
        draft.mkdir(parents=True)
        (draft / "train.bin").touch()
        for path in (draft / "train.bin", draft):
            os.utime(path, (time.time() - age,) * 2)
    prepare_once(tmp_path / "cache", fill)
    assert visible(tmp_path) == [".cache.new", "cache"]


def test_without_locks_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any, **__: Any) -> None:
        raise OSError(ENOLCK, "no locks available")

    def be_overtaken(draft: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "a").write_text("of the other")
        fill(draft)

    said: list[str] = []
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    prepare_once(tmp_path / "cache", be_overtaken, say=said.append)
    assert (tmp_path / "cache" / "a").read_text() == "of the other"
    assert visible(tmp_path) == ["cache"]
    assert len(said) == 1 and "is on a file system without locks" in said[0]


def test_other_errors_of_the_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        prepare_once(tmp_path / "cache", fill)


def test_a_failed_preparation_leaves_nothing_and_the_next_may_succeed(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        fill(draft)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare_once(tmp_path / "cache", fail)
    assert visible(tmp_path) == []
    prepare_once(tmp_path / "cache", fill)
    assert visible(tmp_path) == ["cache"]


def test_cache_folder_depends_on_every_setting(tmp_path: Path) -> None:
    settings = (["3.11", 300], ["3.12", 300], ["3.11", 400])
    folders = {cache_folder(tmp_path, name="text", depends_on=setting) for setting in settings}
    assert len(folders) == 3
    assert cache_folder(tmp_path, name="text", depends_on=["3.11", 300]) in folders
