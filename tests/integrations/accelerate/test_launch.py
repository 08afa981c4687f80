"""``accelerate launch`` starts ranks with a ``MiCSPlugin``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
"""


SCRIPT = """
import torch
from accelerate import Accelerator
from lightning_mics.integrations.accelerate import MiCSPlugin

plugin = MiCSPlugin(partition_size=2)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, gradient_accumulation_steps=2)
model = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(3)))
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for index in range(4):
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.randn(2, 5)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
plugin = type(accelerator.state.fsdp_plugin).__name__
print(f"rank {accelerator.process_index} of {accelerator.num_processes}: {plugin}", flush=True)
"""


def test_accelerate_launches_it_with_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_"))}
    command = ["-m", "accelerate.commands.launch", "--config_file", "config.yaml", "--main_process_port=0", "train.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank} of 2: MiCSPlugin" in done.stdout
