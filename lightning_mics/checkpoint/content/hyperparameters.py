"""Networks and other things in hyper-parameters, which one process pickles and a sharded model does not let be pickled.

``save_hyperparameters()`` of a module that takes a network keeps the network, and Lightning pickles it at each
checkpoint. Once it is sharded, its class and hooks are FSDP2's. What is saved here is the network as it was before,
without values: these are in the checkpoint already, and loading puts them in.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics._torch.pickling import first_unpicklable

_ENGINES = ("torch.distributed", "lightning_mics")


def to_save(parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Hyper-parameters as they can be saved, and those that cannot.

    Args:
        parameters: Hyper-parameters by name.

    Returns:
        The ones to save; and of the others the class, by dotted name.
    """
    known: dict[int, nn.Module] = {}
    kept, dropped = {}, {}
    for name, value in parameters.items():
        bare = _bare(value, known)
        problem = first_unpicklable(bare, name)
        if problem is None:
            kept[name] = bare
        else:
            dropped[problem[0]] = problem[1]
    return kept, dropped


def _bare(value: Any, known: dict[int, nn.Module]) -> Any:
    """A value whose sharded modules are replaced by what they were."""
    if isinstance(value, nn.Module):
        sharded = any(isinstance(parameter, DTensor) for parameter in value.parameters())
        return _bare_module(value, known) if sharded else value
    if type(value) is dict:
        return {key: _bare(entry, known) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_bare(entry, known) for entry in value)
    return value


def _bare_module(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    kind = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    bare = known[id(module)] = object.__new__(kind)
    state = {name: value for name, value in vars(module).items() if not _is_of_engine(value)}
    for name, hooks in state.items():
        if isinstance(hooks, OrderedDict) and name.endswith("hooks"):
            state[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_engine(hook))
    state["_parameters"] = {name: _without_values(parameter) for name, parameter in module._parameters.items()}
    state["_modules"] = {
        name: None if child is None else _bare_module(child, known) for name, child in module._modules.items()
    }
    vars(bare).update(state)
    return bare


def _is_of_engine(value: Any) -> bool:
    """Whether an attribute or hook is one of those that shard the model."""
    function = getattr(value, "hook", value)
    function = getattr(function, "func", function)
    home = getattr(function, "__module__", None) if callable(function) else type(function).__module__
    return isinstance(home, str) and home.startswith(_ENGINES) and not isinstance(value, nn.Module)


def _without_values(parameter: nn.Parameter | None) -> Any:
    return None if parameter is None else _Uninitialized(parameter)


class _Uninitialized:
    """A parameter that is pickled without its values."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._facts = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)

    def __reduce__(self) -> tuple[Any, ...]:
        return uninitialized_parameter, self._facts


def uninitialized_parameter(size: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    """A parameter whose values are loaded afterwards.

    Args:
        size: Shape.
        dtype: Dtype.
        requires_grad: Whether it is trained.
    """
    return nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad)
