"""Calls around the steps of all optimizers of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Call = Callable[[Optimizer], None]


class _Calls:
    """A hook of torch that calls methods, in the order in which they came, for as long as their objects live.

    It is never removed: an object may die while torch iterates over its hooks, whose dictionary must not change then.
    """

    def __init__(self, register: Callable[[Any], Any] = lambda _: None) -> None:
        self._register = register
        self._methods: list[WeakMethod[Call]] | None = None

    def add(self, method: Call) -> None:
        """Call ``method(optimizer)`` from now on."""
        if self._methods is None:
            self._register(self.call)
        self._methods = [*(known for known in self._methods or () if known() is not None), WeakMethod(method)]

    def call(self, optimizer: Optimizer, *_: Any) -> None:
        """Call the methods now."""
        for method in self._alive():
            method(optimizer)

    def _alive(self) -> Iterator[Call]:
        return (method for known in self._methods or () if (method := known()) is not None)


_before = _Calls(register_optimizer_step_pre_hook)
_after = _Calls(register_optimizer_step_post_hook)
_before_unscaling = _Calls()  # no hook of torch: a gradient scaler makes these calls


def call_before_steps(method: Call) -> None:
    """Call a method before each step of an optimizer, whichever.

    Args:
        method: Bound method, called as ``method(optimizer)``; its object is held weakly.
    """
    _before.add(method)


def call_after_steps(method: Call) -> None:
    """Call a method after each step of an optimizer, whichever.

    Args:
        method: Bound method, called as ``method(optimizer)``; its object is held weakly.
    """
    _after.add(method)


def call_first_before_step(optimizer: Optimizer, function: Callable[..., None]) -> None:
    """Call a function before each step of an optimizer, also before hooks that step in its place.

    Args:
        optimizer: The optimizer.
        function: Hook as torch calls it, with the optimizer and the arguments of the step.
    """
    handle = optimizer.register_step_pre_hook(function)
    hooks: Any = optimizer._optimizer_step_pre_hooks
    hooks.move_to_end(handle.id, last=False)


def call_before_unscaling(method: Call) -> None:
    """Call a method before a gradient scaler unscales the gradients of an optimizer, whichever.

    Args:
        method: Bound method, called as ``method(optimizer)``; its object is held weakly.
    """
    _before_unscaling.add(method)


def call_as_unscaled(optimizer: Optimizer) -> None:
    """Make the calls before the gradients of an optimizer are unscaled.

    Args:
        optimizer: Optimizer whose gradients are unscaled next.
    """
    _before_unscaling.call(optimizer)


def call_as_stepped(optimizer: Optimizer) -> None:
    """Make the calls before and after a step of an optimizer that is skipped.

    Args:
        optimizer: Optimizer that does not step.
    """
    _before.call(optimizer)
    _after.call(optimizer)
