"""Observing the operations of torch, by any number of observers in one dispatch mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.distributed.tensor import DTensor

from lightning_mics._torch.fake import TorchDispatchMode


class Observer(Protocol):
    """Receives each operation on tensors; operations on DTensors run others on local tensors, which count instead."""

    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """Called before ``operation`` runs.

        Args:
            operation: Operation of torch.
            args: Positional arguments of the operation.
        """

    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Called after ``operation`` has run.

        Args:
            operation: Operation of torch.
            args: Positional arguments of the operation.
            kwargs: Keyword arguments of the operation.
            result: Result of the operation.
        """


class Observed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes each operation that runs inside the context to ``observers``.

    Args:
        observers: Observers, in the order in which they are called.
    """

    def __init__(self, *observers: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observers = observers

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        for observer in self._observers:
            observer.before(operation, args)
        result = self.run(operation, args, kwargs)
        for observer in self._observers:
            observer.after(operation, args, kwargs, result)
        return result

    def run(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; subclasses may replace its result.

        Args:
            operation: Operation of torch.
            args: Positional arguments of the operation.
            kwargs: Keyword arguments of the operation.
        """
        return operation(*args, **kwargs)
