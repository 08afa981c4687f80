"""Registers ``strategy="mics"`` with Lightning when Lightning is imported, without importing it.

Modules of Lightning that are imported already are handled immediately. For the others, a finder at the head of
``sys.meta_path`` wraps the loader that the other finders return, so that the registration follows the import. A
strategy's own module is imported when the strategy is first requested by name. ``pytorch_lightning`` and
``lightning_fabric`` are copies of the same code with other classes, which take no strategy of ``lightning``: there the
name and the object raise an error that says what to import.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any

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


class AfterImport(MetaPathFinder):
    """Calls functions after the imports of certain modules; removes itself after the last of them.

    An error in such a function becomes a warning: it must not stop the import, nor look like an error of the imported
    module.

    Args:
        then: Functions that take the imported module, by the module's full name.
    """

    def __init__(self, then: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._then = dict(then)
        self._lock = Lock()

    def start(self) -> None:
        """Watch imports from now on, and call the functions of modules that are imported already."""
        names = list(self._then)
        sys.meta_path.insert(0, self)
        for name in names:
            if name in sys.modules:
                self.imported(import_module(name))  # waits if another thread is importing it

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders return, with a loader that reports to this one.

        Args:
            fullname: Full name of the module.
            path: Search path of the parent package; None for a top-level module.
            target: Module to reload, if any.
        """
        if fullname not in self._then:
            return None
        finders = list(sys.meta_path)
        later = finders[finders.index(self) + 1 :] if self in finders else []
        found = (finder.find_spec(fullname, path, target) for finder in later if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ReportingLoader(spec.loader, self.imported)
        return spec

    def imported(self, module: ModuleType) -> None:
        """Call the function of ``module``, unless it was called before."""
        with self._lock:
            then = self._then.pop(module.__name__, None)
            if not self._then:  # a new list: an import in another thread may be iterating over the current one
                sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        if then is None:
            return
        try:
            then(module)
        except Exception as error:
            warnings.warn(
                f"lightning_mics could not register strategy={NAME!r} with {module.__name__}: {error!r}", stacklevel=2
            )


class _ReportingLoader(Loader):
    """A loader that delegates to another, and calls a function after the module has been executed."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
