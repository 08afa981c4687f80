"""Random changes to a checkpoint end in errors of our own, and it would show if they did not."""

from __future__ import annotations

import subprocess
import sys

FUZZ = [sys.executable, "-m", "tests.stress.fuzz_checkpoints", "--mutations", "60", "--seed", "2"]


def test_mutations_end_in_clean_errors() -> None:
    ended = subprocess.run(FUZZ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("60 mutations: ") and "DamagedCheckpointError" in ended.stdout
    assert ended.stdout.splitlines()[1] == "0 wrong"


def test_a_load_that_checks_nothing_is_found_out() -> None:
    unchecked = (
        "import runpy, sys; from lightning_mics.checkpoint.opening import OpenCheckpoint; "
        "OpenCheckpoint.check_on_all_ranks = lambda _: None; "
    )
    code = (
        f"{unchecked} sys.argv = {FUZZ[2:]!r}; runpy.run_module('tests.stress.fuzz_checkpoints', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "loaded" in ended.stdout.splitlines()[2]
