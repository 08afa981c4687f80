"""Ranks that could not join are forked anew; what died and what was late are told apart."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.support import forked
from tests.support.forked import RankError, SharedRanks, run_ranks


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_that_could_not_join_are_forked_anew(monkeypatch, tmp_path, shared):
    join, failed = forked._join, tmp_path / "failed"

    def joining(rank, world_size, store):
        if rank == 1 and not failed.exists():
            failed.touch()
            raise forked.NotJoinedError("the peer closed the connection")
        join(rank, world_size, store)

    monkeypatch.setattr(forked, "_join", joining)
    monkeypatch.setattr(forked, "GRACE", 0.5)
    ranks = SharedRanks(2)
    with pytest.warns(UserWarning, match="forked anew: --- rank 0:\n.*within 0.5 s of another"):
        assert (ranks.run if shared else partial(run_ranks, 2))(dist.get_world_size) == [2, 2]
    ranks.close()


def test_other_failures_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(forked, "GRACE", 0.5)

    def runs():
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # so that rank 0 has died
        raise ValueError(torch.tensor(3).item())

    with pytest.raises(RankError) as error:
        run_ranks(2, runs)
    assert error.value.failures == {0: ("Timeout", ""), 1: ("ValueError", "3")}
    assert "the process died with exit code -9" in str(error.value)
