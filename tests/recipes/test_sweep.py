from __future__ import annotations

import os
import sys

import pytest
import torch.distributed as dist

from recipes.sweep import one_job
from tests.forked import run_ranks


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
