"""What ranks measure of themselves on an emulated cluster whose nodes read the counters of their own links."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.launches import Shape
from benchmarks.emulated_cluster import EmulatedCluster


def measure(module: str, shape: Shape, scratch: Path, *, timeout: float = 1500) -> dict[str, Any]:
    """Launch the ranks of a benchmark, one torchrun per node; returns what rank 0 has written.

    Args:
        module: Module to run, which takes ``--work FILE --shapes SHAPE`` to be one rank and write ``FILE``.
        shape: Nodes and ranks.
        scratch: Folder of the file.
        timeout: Seconds until the launch is given up.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    out = scratch / f"{shape}.json"
    script = (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --nnodes $NNODES --node-rank $NODE_RANK "
        f"--nproc-per-node {shape.ranks_per_node} --master-addr $MASTER_ADDR --master-port $MASTER_PORT "
        f"-m {module} --work {out} --shapes {shape}"
    )
    with EmulatedCluster(shape.nodes) as cluster:
        print(cluster.start(["sh", "-c", script]).wait(timeout=timeout))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def circumstances() -> dict[str, Any]:
    """What a page says of the machine and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
