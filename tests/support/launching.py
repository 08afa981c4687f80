"""What tests need that start processes by a launcher."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import run

LAUNCHERS = ("MASTER_", "RANK", "LOCAL_", "GROUP_", "WORLD_", "NODE_", "TORCHELASTIC_", "SLURM_", "PL_")


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Torchrun:
    """torchrun in a fork of this process, which starts its ranks as forks too: none of them imports anything again.

    Args:
        folder: Folder for what is printed to stderr.
        script: Path of the program.
        arguments: Arguments of the program.
    """

    def __init__(self, folder: Path, script: str, *arguments: str, ranks: int = 2) -> None:
        self._errors = folder / "stderr"
        read, write = os.pipe()
        options = ["--standalone", f"--nproc-per-node={ranks}", "--start-method=fork", "--run-path"]
        self._process: Any = multiprocessing.get_context("fork").Process(
            target=_run, args=(write, self._errors, [*options, script, *arguments])
        )
        self._process.start()
        os.close(write)
        self.stdout: TextIO = os.fdopen(read)

    def terminate(self) -> None:
        """Send SIGTERM to torchrun."""
        os.kill(self._process.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> tuple[int | None, str]:
        """Wait until it has ended; its exit status, None if it has not, and what it has printed to stderr."""
        self._process.join(timeout)
        return self._process.exitcode, self._errors.read_text()

    def close(self) -> None:
        """End it, if it has not ended by itself."""
        self._process.kill()
        self._process.join()
        self.stdout.close()


@contextmanager
def torchrun(folder: Path, script: str, *arguments: str, ranks: int = 2) -> Iterator[Torchrun]:
    """See :class:`Torchrun`."""
    job = Torchrun(folder, script, *arguments, ranks=ranks)
    try:
        yield job
    finally:
        job.close()


def _run(stdout: int, stderr: Path, arguments: list[str]) -> None:
    os.dup2(stdout, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  # pytest has replaced them
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    run.main(arguments)
