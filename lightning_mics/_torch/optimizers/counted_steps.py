"""The collectives that the step of an optimizer runs by itself, as DTensors do that it looks at as a whole."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mics._torch.collective_operations import CollectiveOperation, collective_of


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, record: Callable[[CollectiveOperation], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record
        self.paused = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it runs others on shards, and those that move them
        if operation.namespace in ("_c10d_functional", "_dtensor") and not self.paused:
            collective = collective_of(operation, args)
            if collective is not None:
                self._record(collective)
        return operation(*args, **(kwargs or {}))


def count_collectives_of_steps(optimizer: Optimizer, record: Callable[[CollectiveOperation], None]) -> None:
    """Record collectives that the steps of an optimizer run, those of its closure excepted.

    Args:
        optimizer: The optimizer; it gets a method ``step`` of its own.
        record: Called with each.
    """
    original = optimizer.step
    if hasattr(original, "_counts_collectives"):
        return

    def step(_optimizer: Optimizer, closure: Any = None, **options: Any) -> Any:
        counted = _Counted(record)

        def uncounted() -> Any:
            counted.paused = True
            try:
                return closure()
            finally:
                counted.paused = False

        with counted:
            return original(**options) if closure is None else original(uncounted, **options)

    vars(step).update(getattr(original, "__dict__", {}), _counts_collectives=True)  # with marks of schedulers
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
