"""Fabric starts the ranks itself, or its command line does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.campaign import campaign

pytestmark = pytest.mark.launch


SCRIPT = """
import sys, torch
from lightning.fabric import Fabric
import lightning_mics
from tests.support.models import TinyLM, tokens

fabric = Fabric({arguments})
fabric.launch() if {launches} else None
model = TinyLM()
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
fabric.backward(model(tokens(2)))
optimizer.step()
print(f"rank {{fabric.global_rank}} of {{fabric.world_size}}: {{type(fabric.strategy).__name__}}", flush=True)
"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        campaign([], 'accelerator="cpu", devices=2, strategy="mics"', id="launch"),
        pytest.param(
            ["-m", "lightning_mics", "run", "--strategy=mics", "--accelerator=cpu", "--devices=2"],
            "",
            id="command line",
        ),
    ],
)
def test_ranks_are_launched(command: list[str], arguments: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(arguments=arguments, launches=not command))
    root = Path(__file__).parents[3]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_"))}
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        env={**environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank} of 2: MiCSFabricStrategy" in done.stdout
