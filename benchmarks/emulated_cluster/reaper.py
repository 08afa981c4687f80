"""Removes a cluster as soon as its owner dies, also by SIGKILL.

Started by the owner, which holds the other end of this process's standard input. The kernel closes that end when the
owner ends, whatever ended it.

python -m benchmarks.emulated_cluster.reaper NAME
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.emulated_cluster import registry


@contextmanager
def reaper(name: str) -> Iterator[None]:
    """Have the cluster ``name`` removed if this process dies in the meantime."""
    command = [sys.executable, "-m", "benchmarks.emulated_cluster.reaper", name]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of Ctrl-C
    )
    try:
        yield
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    sys.stdin.read()
    registry.remove(sys.argv[1])
