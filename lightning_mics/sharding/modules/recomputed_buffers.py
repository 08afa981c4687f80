"""Buffers and counters that a recomputed block changes: changed once, and recomputed from the values of its forward.

Activation checkpointing runs a forward again in backward. Without this, running statistics would be updated twice, and
a power iteration or a codebook would be at other values than in the forward, so gradients would be those of another
function. Here the recomputation begins with the values that the forward began with, and works on copies of them.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

from torch import Tensor, nn

Values = Mapping[nn.Module, Mapping[str, Any]]


class RecomputedState:
    """What the forward of one recomputed module may change: buffers, and attributes that its methods assign.

    Attributes count if they are numbers, or tensors without gradients.

    Args:
        module: The module that is recomputed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        assigned = {each: _assigned_attributes(type(each)) for each in self._modules}
        self._assigned = {each: names for each, names in assigned.items() if names}

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of the forward that begins now and of its recomputation, as ``checkpoint`` asks for them."""
        return nullcontext(), _AsBefore(self._modules, self._assigned)

    @property
    def exists(self) -> bool:
        """Whether the modules have any now."""
        return bool(self._assigned) or any(each._buffers for each in self._modules)


class _AsBefore(AbstractContextManager[None]):
    """Inside, buffers and attributes have copies of the values that they have when this is made."""

    def __init__(self, modules: Iterable[nn.Module], assigned: Mapping[nn.Module, Iterable[str]]) -> None:
        self._modules = modules
        self._assigned = assigned
        self._buffers = _copies({each: each._buffers for each in modules if each._buffers})
        self._attributes = _copies(self._attributes_now())

    def __enter__(self) -> None:
        self._buffers_now = {each: dict(each._buffers) for each in self._modules}
        self._now = self._attributes_now()
        buffers, attributes = _copies(self._buffers), _copies(self._attributes)
        for module in self._modules:
            _set(module._buffers, buffers.get(module, {}))
        for module, values in attributes.items():
            vars(module).update(values)

    def __exit__(self, *_: object) -> None:
        for module, buffers in self._buffers_now.items():
            _set(module._buffers, buffers)
        for module, values in self._now.items():
            vars(module).update(values)

    def _attributes_now(self) -> Values:
        return {
            module: {name: value for name in names if _is_state(value := vars(module).get(name))}
            for module, names in self._assigned.items()
        }


def _assigned_attributes(kind: type) -> frozenset[str]:
    """Attributes that methods of a module class assign, its constructor apart; not those of torch's own modules."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner.__module__.startswith("torch.") or not issubclass(owner, nn.Module):
            continue
        methods = [each for name, each in vars(owner).items() if isinstance(each, FunctionType) and name != "__init__"]
        names |= {
            instruction.argval
            for method in methods
            for instruction in dis.get_instructions(method)
            if instruction.opname == "STORE_ATTR"
        }
    return frozenset(names)


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad
    return isinstance(value, int | float)


def _copies(values: Values) -> dict[nn.Module, dict[str, Any]]:
    """Copies of the tensors in ``values``, one of each, so that shared ones stay shared."""
    made: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.requires_grad:
            return value
        if id(value) not in made:
            made[id(value)] = value.clone()
        return made[id(value)]

    return {module: {name: copy(value) for name, value in named.items()} for module, named in values.items()}


def _set(buffers: dict[str, Any], values: Mapping[str, Any]) -> None:
    buffers.clear()
    buffers.update(values)
