"""Gradient sums that wait for the boundary, beside those that FSDP2 itself keeps.

FSDP2 defers one thing: the all-reduce over replicas. What else waits is added up here, and FSDP2 is handed zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class PendingGradients:
    """What one unit (a block, or what the root holds) keeps back until the boundary.

    Used on whatever stream its unit reduces gradients on, always the same.

    Args:
        parameters: Returns the unit's sharded parameters.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.at_boundary = True
        self._parameters = parameters
        self._sums: Tensor | None = None
        self._without_gradient: list[nn.Parameter] = []

    @property
    def pending(self) -> bool:
        """Whether sums wait."""
        return self._sums is not None

    def tensors(self) -> list[Tensor]:
        """What waits: [any], if anything does."""
        return [] if self._sums is None else [self._sums]

    def accumulate(self, part: Tensor) -> None:
        """Add ``part`` to what waits; it is copied."""
        self._without_gradient += [p for p in self._parameters() if p.grad is None]
        if self._sums is None:
            self._sums = part.clone()
        else:
            self._sums += part

    def add_into(self, part: Tensor) -> None:
        """Add what waits to ``part``, and forget it."""
        if self._sums is not None:
            part += self._sums
        self._sums = None

    @torch.no_grad()
    def remove_zeros(self) -> None:
        """After a backward that kept its gradients back: take away the zeros that FSDP2 made gradients of."""
        for parameter in self._without_gradient:
            parameter.grad = None
        self._without_gradient.clear()

    def drop(self) -> None:
        """Forget what waits."""
        self._sums = None
        self._without_gradient.clear()
