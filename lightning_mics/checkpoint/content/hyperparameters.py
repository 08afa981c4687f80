"""Networks in hyper-parameters, which one process pickles, and which cannot be pickled once they are sharded.

``save_hyperparameters()`` of a module that takes a network keeps the network, and Lightning pickles it at each
checkpoint. So it is copied before the model is sharded, without the values of the model's parameters: these are in the
checkpoint already, and loading puts them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lightning_mics._torch.pickling import first_unpicklable, tensors_inside


def copies_without_values(parameters: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Copy the hyper-parameters that hold parameters of a model, without their values.

    Args:
        parameters: Hyper-parameters by name.
        model: The model, not sharded yet.

    Returns:
        The copies by name, of those that can be pickled.
    """
    empty = {id(parameter): _Uninitialized(parameter) for parameter in model.parameters()}
    copies = {}
    for name, value in parameters.items():
        if first_unpicklable(value) is None and any(id(tensor) in empty for tensor in tensors_inside(value)):
            copies[name] = deepcopy(value, {**empty, **{id(stand_in): stand_in for stand_in in empty.values()}})
    return copies


def to_save(parameters: Mapping[str, Any], copies: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Hyper-parameters as they can be saved, and those that cannot.

    Args:
        parameters: Hyper-parameters by name.
        copies: Copies to save in their place, from :func:`copies_without_values`.

    Returns:
        The ones to save; and of the others the class, by dotted name.
    """
    kept, dropped = {}, {}
    for name, value in parameters.items():
        saved = copies.get(name, value)
        problem = first_unpicklable(saved, name)
        if problem is None:
            kept[name] = saved
        else:
            dropped[problem[0]] = problem[1]
    return kept, dropped


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
