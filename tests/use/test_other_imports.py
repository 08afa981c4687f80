"""Programs that import the copies of Lightning hear what to import; the copies' own strategies work as before."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import warnings; warnings.filterwarnings("ignore")
import {first}
import {second}
from {package} import {host}
for strategy in ({strategies}):
    try:
        {host}(strategy=strategy, accelerator="cpu", devices=1)
        print("taken")
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(package: str, host: str, strategy: str, *, ours_first: bool) -> list[str]:
    first, second = ("lightning_mics", package) if ours_first else (package, "lightning_mics")
    strategies = f"'mics', 'MiCS', lightning_mics.{strategy}(), 'auto', 'ddp'"
    program = PROGRAM.format(first=first, second=second, package=package, host=host, strategies=strategies)
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()


@pytest.mark.launch
@pytest.mark.parametrize(
    ("package", "host", "strategy", "ours_first", "module"),
    [
        ("pytorch_lightning", "Trainer", "MiCSStrategy", False, "lightning.pytorch"),
        ("lightning_fabric", "Fabric", "MiCSFabricStrategy", True, "lightning.fabric"),
    ],
)
def test_copies_of_lightning_reject_mics_and_say_what_to_import(
    package: str, host: str, strategy: str, ours_first: bool, module: str
) -> None:
    lines = run(package, host, strategy, ours_first=ours_first)
    message = (
        f"ValueError strategy 'mics' is one of {module}, and this is {package}, a copy of it with classes of its own: "
        f"write `import {module}` in place of `import {package}`, also for callbacks, loggers and modules"
    )
    assert lines == [message, message, message, "taken", "taken"]
