"""Functions that run after the import of certain modules, which are not imported for them.

Modules that are imported already are handled immediately. For the others, a finder at the head of ``sys.meta_path``
wraps the loader that the other finders return, so that the function follows the import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any


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
            warnings.warn(f"lightning_mics could not adapt {module.__name__}: {error!r}", stacklevel=2)


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
