"""Programs that import the copies of Lightning hear what to import; the copies' own strategies work as before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_mics.integrations._registration import COPIES

PROGRAM = """
import warnings; warnings.filterwarnings("ignore")
import pytorch_lightning
import lightning_mics
import lightning_fabric.connector
from lightning_fabric import Fabric
from pytorch_lightning import Trainer
hosts = (Trainer, lightning_mics.MiCSStrategy), (Fabric, lightning_mics.MiCSFabricStrategy)
for host, strategy in hosts:
    for given in ("mics", "MiCS", strategy(), "auto", "ddp"):
        try:
            host(strategy=given, accelerator="cpu", devices=1)
            print("taken")
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.launch
def test_copies_of_lightning_reject_mics_and_say_what_to_import() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = finished.stdout.splitlines()
    for index, (copy, module) in enumerate(COPIES.items()):
        message = (
            f"ValueError strategy 'mics' is one of {module}, and this is {copy}, a copy of it with classes of its own: "
            f"write `import {module}` in place of `import {copy}`, also for callbacks, loggers and modules"
        )
        assert lines[5 * index : 5 * index + 5] == [message, message, message, "taken", "taken"]
