"""Gradients of parameters that are used while they are sharded: outside of the forward that FSDP2 gathers them for.

See :mod:`lightning_mics._torch.units.direct_use`. Autograd would add them to ``.grad`` in the middle of a backward,
where FSDP2 adds its own from another stream; and in a window of several micro-steps ``.grad`` is None until the
boundary. So they are accumulated here, as shards, and added at the end of the boundary's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics._torch.fsdp import after_backward
from lightning_mics._torch.units.direct_use import averaged, take_direct_gradients


class DirectGradients:
    """Gradients of sharded parameters from their direct use, in addition to those that FSDP2 reduces.

    Args:
        root: The sharded model.
        at_boundary: Returns whether the current micro-step is the boundary.
    """

    def __init__(self, root: FSDPModule, at_boundary: Callable[[], bool]) -> None:
        self._at_boundary = at_boundary
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._merges_after_backward = False
        take_direct_gradients(root, self._take)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the accumulated gradients to ``.grad``; none are accumulated afterwards."""
        for parameter, gradient in self._sums.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._sums = {}

    @property
    def parameters(self) -> Set[nn.Parameter]:
        """The parameters that have an accumulated gradient, sharded: each [any]."""
        return self._sums.keys()

    def drop(self) -> None:
        """Drop the accumulated gradients."""
        self._sums = {}

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        assert isinstance(parameter, DTensor)
        part = averaged(gradient.detach().to(parameter.dtype), like=parameter)
        self._sums[parameter] = self._sums[parameter] + part if parameter in self._sums else part.clone()
        if not self._merges_after_backward:
            self._merges_after_backward = True
            after_backward(self._end)

    def _end(self) -> None:
        self._merges_after_backward = False
        if self._at_boundary():
            self.merge()
