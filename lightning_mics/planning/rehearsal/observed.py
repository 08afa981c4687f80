"""Observing the operations of torch on tensors without values, by any number of observers in one dispatch mode."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_mics._torch.fake import DEVICE_OF, NEEDS_VALUES, TorchDispatchMode


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
        if operation is DEVICE_OF:  # no operation on a device, and half of what fake tensors dispatch
            return operation(*args)
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


class WithoutValues(Observed):  # type: ignore[no-untyped-call]
    """Replaces values that fake tensors do not have: numbers are 0, conditions are False, comparisons are equal.

    Grouped products run in bfloat16 whatever the dtype, as their fake kernel takes no other; the real one does.
    """

    @override
    def run(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation, or return a stand-in for its value.

        Args:
            operation: Operation of torch.
            args: Positional arguments of the operation.
            kwargs: Keyword arguments of the operation.
        """
        if operation is torch.ops.aten.equal.default:
            return True
        if operation is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if operation is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            one, other, *rest = args
            product = operation(one.bfloat16(), other.bfloat16(), *rest, **{**kwargs, "out_dtype": None})
            return product.to(one.dtype)
        return operation(*args, **kwargs)


@contextmanager
def naming_values() -> Iterator[None]:
    """Explain errors of models whose shapes depend on values, which tensors of a plan do not have.

    Raises:
        ValueError: In place of torch's error, with the line of the model.
    """
    try:
        yield
    except NEEDS_VALUES as error:
        frames = traceback.extract_tb(error.__traceback__)
        torchs, own = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])
        of_model = [frame for frame in frames if not frame.filename.startswith((torchs, own))]
        place = f"{of_model[-1].filename}:{of_model[-1].lineno}" if of_model else "the model"
        raise ValueError(
            f"{place} has shapes that depend on values ({getattr(error, 'func', error)}), and a plan runs on tensors "
            "that have shapes only: give it a model with fixed shapes in that place, such as one that sends as many "
            "tokens to each expert (`x[: len(x) // experts]` for `x[mask]`), or, in transformers, "
            "`model.set_experts_implementation('batched_mm')`"
        ) from error
