"""``python -m lightning_mics run --strategy=mics SCRIPT``: Fabric's command line, which finds strategies by name."""

from lightning.fabric.cli import _main

import lightning_mics  # noqa: F401 - registers them

if __name__ == "__main__":
    _main()
