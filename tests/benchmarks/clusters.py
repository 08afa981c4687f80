"""What the tests of the emulated cluster share: when to skip them, waiting for a condition, and traffic to measure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emulated_cluster.iproute import check_machine
from benchmarks.emulated_cluster.network import Network

ROOT = Path(__file__).parents[2]
TRAFFIC = [sys.executable, str(Path(__file__).with_name("traffic_script.py"))]


def _refusal() -> str | None:
    try:
        check_machine()
    except RuntimeError as refusal:
        return str(refusal)
    return None


needs_cluster = pytest.mark.skipif(_refusal() is not None, reason=_refusal() or "")


def until(condition: Callable[[], Any], *, seconds: float = 30) -> Any:
    """Wait until ``condition`` is true and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.01)
    return result


def namespaces(network: Network) -> list[str]:
    """What is left of a cluster."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"ec-{network.name}-")]


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
