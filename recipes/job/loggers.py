"""Checking that the packages of loggers are installed, before anything that takes long."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

PACKAGES = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}  # not among Lightning's dependencies


def check_loggers(loggers: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the packages of the configured ``loggers``, by name, are installed.

    Raises:
        ModuleNotFoundError: If a package is missing; the message names the command to install it.
    """
    for name, logger in loggers.items():
        package = PACKAGES.get(logger["_target_"].rpartition(".")[2])
        if package is not None and find_spec(package) is None:
            raise ModuleNotFoundError(
                f"logger={name} needs the package {package!r}, which is not installed: pip install {package}, or leave "
                "logger=csv"
            )
