from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from recipes.job.sweep import one_job
from tests.support.forked import run_ranks


def test_a_job_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="the job failed"):
        _fail()
    assert sys.argv == ["train.py", "-m", "seed=0,1"]
    assert dict(os.environ) == before


def _fail() -> None:
    with one_job(["seed=1"]):
        assert sys.argv == ["train.py", "seed=1"]  # what Lightning starts other ranks with
        os.environ["LOCAL_RANK"] = "0"
        raise RuntimeError("the job failed")


def test_no_process_group_is_left() -> None:
    assert run_ranks(2, _job) == [(True, False)] * 2


def _job() -> tuple[bool, bool]:
    with one_job([]):
        inside = dist.is_initialized()
    return inside, dist.is_initialized()


def start_rank() -> tuple[subprocess.Popen[str], _ChildProcessObserver]:
    """A process that ends when it is written to, under Lightning's eyes."""
    rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    watcher = _ChildProcessObserver(main_pid=os.getpid(), child_processes=[rank])
    watcher.start()
    return rank, watcher


def test_ranks_of_a_job_that_fails_do_not_end_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda self: ended.append("the sweep"))
    started = []
    with pytest.raises(RuntimeError, match="the job failed"):
        _fail_with(started)
    rank, watcher = started[0]
    assert rank.returncode == -9
    watcher._run()  # as it does every few seconds
    assert not ended


def _fail_with(started: list[tuple[subprocess.Popen[str], _ChildProcessObserver]]) -> None:
    with one_job([]):
        started.append(start_rank())
        raise RuntimeError("the job failed")


def test_a_job_ends_with_its_last_rank() -> None:
    with one_job([]):
        rank, _ = start_rank()
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.close()
    assert rank.returncode == 0
