"""Watching the operations of torch that a piece of code runs, by any number of observers at the price of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.distributed.tensor import DTensor

from lightning_mics._torch.fake import TorchDispatchMode


class Observer(Protocol):
    """What is told of each operation on plain tensors; those on DTensors run others on their local parts."""

    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        """``operation`` is about to run."""

    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """``operation`` has run."""


class Observed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells ``observers`` of each operation that runs while it is entered.

    Args:
        observers: In the order in which they are told.
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
        """Run it."""
        return operation(*args, **kwargs)
