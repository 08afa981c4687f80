"""Registers ``strategy="mics"`` with Lightning when Lightning is imported, without importing it.

A strategy's own module is imported when the strategy is first requested by name. ``pytorch_lightning`` and
``lightning_fabric`` are copies of the same code with other classes, which take no strategy of ``lightning``: there the
name and the object raise an error that says what to import.
"""

from __future__ import annotations

import inspect
import sys
from functools import wraps
from typing import Any

from lightning_mics.integrations._after_import import AfterImport
from lightning_mics.integrations.trainer.module_loading import read_directories_too

COPIES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


NAME, DESCRIPTION = "mics", "MiCS: sharding inside partition groups, on FSDP2"


def register() -> None:
    """Register with the Trainer, Fabric and ``load_from_checkpoint``, now or when they are imported."""
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        AfterImport(
            {
                "lightning.fabric.strategies": _register_with_fabric,
                "lightning.pytorch.strategies": _register_with_the_trainer,
                "lightning.pytorch.core.saving": read_directories_too,
                "pytorch_lightning.trainer.connectors.accelerator_connector": _say_what_to_import,
                "lightning_fabric.connector": _say_what_to_import,
            }
        ).start()


def _register_with_fabric(strategies: Any) -> None:
    def make(**options: Any) -> Any:
        from lightning_mics.integrations.fabric import MiCSFabricStrategy

        return MiCSFabricStrategy(**options)

    if NAME not in strategies.STRATEGY_REGISTRY:  # it is after a reload
        strategies.STRATEGY_REGISTRY.register(NAME, make, description=DESCRIPTION)


def _register_with_the_trainer(strategies: Any) -> None:
    def make(**options: Any) -> Any:
        from lightning_mics.integrations.trainer.strategy import MiCSStrategy

        return MiCSStrategy(**options)

    if NAME not in strategies.StrategyRegistry:
        strategies.StrategyRegistry.register(NAME, make, description=DESCRIPTION)


def _say_what_to_import(connectors: Any) -> None:
    """Reject ``"mics"`` and its strategies in a copy of Lightning whose classes they do not inherit from."""
    copy = connectors.__name__.partition(".")[0]
    name = "_AcceleratorConnector" if copy == "pytorch_lightning" else "_Connector"
    original, module = getattr(connectors, name), COPIES[copy]
    initialize = original.__init__

    @wraps(initialize)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        strategy = inspect.signature(initialize).bind_partial(self, *args, **kwargs).arguments.get("strategy")
        named = isinstance(strategy, str) and strategy.lower() == NAME
        if named or type(strategy).__module__.partition(".")[0] == __name__.partition(".")[0]:
            raise ValueError(
                f"strategy {NAME!r} is one of {module}, and this is {copy}, a copy of it with classes of its own: "
                f"write `import {module}` in place of `import {copy}`, also for callbacks, loggers and modules"
            )
        initialize(self, *args, **kwargs)

    original.__init__ = checked
