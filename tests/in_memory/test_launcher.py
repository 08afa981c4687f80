"""An error that would come again ends the launcher, and others do not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

RANK = """
import os, sys
from lightning_mics.in_memory.launcher import end_launcher_with_this_rank

class LostError(RuntimeError):
    comes_again = sys.argv[1] != "other"

end_launcher_with_this_rank(os.getppid())
try:
    raise LostError("nothing is left")
except LostError:
    if sys.argv[1] != "handled":
        raise
"""
LAUNCHER = """
import subprocess, sys
print(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""


@pytest.mark.parametrize(("what", "status"), [("comes again", -signal.SIGTERM), ("handled", 0), ("other", 0)])
def test_an_error_that_comes_again_ends_the_launcher(what: str, status: int) -> None:
    launcher = [sys.executable, "-c", LAUNCHER, RANK, what]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    *_, last = ["", *done.stderr.splitlines()]
    if status:
        assert "LostError: nothing is left\n" in done.stderr
        assert "another start of the ranks would end in the same LostError, so torchrun" in last
    else:
        assert done.stdout == f"{int(what == 'other')}\n"
