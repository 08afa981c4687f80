"""What tests need that start processes by a launcher."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

LAUNCHERS = ("MASTER_", "RANK", "LOCAL_", "GROUP_", "WORLD_", "NODE_", "TORCHELASTIC_", "SLURM_", "PL_")


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
