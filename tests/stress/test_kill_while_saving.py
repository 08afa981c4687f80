"""The job that is killed while it saves goes on unharmed, and it would show if it did not."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mics import checkpoint
from tests.stress import kill_while_saving


def test_a_job_that_is_killed_at_random_moments_goes_on_with_the_same_losses(capsys: Any) -> None:
    assert kill_while_saving.main(["--kills", "3", "--ranks", "2", "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 kills of a job of 2 ranks; ") and "; 0 wrong" in shown


def test_a_resume_that_forgets_the_optimizer_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: load(path, **{**options, "optimizers": []}))
    assert kill_while_saving.main(["--kills", "6", "--ranks", "1", "--seed", "1"]) == 1
    assert "against a run that nobody killed: the loss of step " in capsys.readouterr().out


def test_a_checkpoint_that_was_lost_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(checkpoint, "prepare_sharded", lambda path, **options: lambda: None)
    assert kill_while_saving.main(["--kills", "6", "--ranks", "1", "--seed", "1"]) == 1
    assert ": resumed at step 0, and " in capsys.readouterr().out
