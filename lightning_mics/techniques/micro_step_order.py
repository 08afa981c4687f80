"""The order in which a model gathers its units and adds up their gradients, as the micro-steps before it did.

What is begun before it is needed, here or by :mod:`~lightning_mics.techniques.inter_node_prefetch`, is what a
micro-step is expected to need: what the two before it have both needed, in their order, for as long as it does so
itself. Micro-steps are compared with those of their kind: the first one of an accumulation window, which fills caches,
another one, or a forward without a backward.

All of this follows from what a rank has done before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.units.param_groups import around_end_of_backward

LONGEST = 100_000  # uses in a micro-step that are remembered

Unit = TypeVar("Unit")


@dataclass
class UseOrder(Generic[Unit]):
    """The uses of units in the micro-steps of one kind; the module says what is expected of them.

    A use is a unit, and whether it is used in a backward; None where a forward begins.

    Attributes:
        before: Uses of the micro-step before.
        expected: First uses of this one, as far as the two before it agree, and this one with them.
        now: Uses of this one.
    """

    before: list[tuple[Unit, bool] | None] = field(default_factory=list)
    expected: list[tuple[Unit, bool] | None] = field(default_factory=list)
    now: list[tuple[Unit, bool] | None] = field(default_factory=list)

    def add(self, use: tuple[Unit, bool] | None) -> None:
        """Note a use that happens now."""
        place = len(self.now)
        if place < len(self.expected) and self.expected[place] != use:
            del self.expected[place:]
        if place < LONGEST:
            self.now.append(use)

    def coming(self, count: int) -> list[Unit]:
        """The units of the next uses in this forward and its backward, as expected; at most ``count``."""
        coming = self.expected[len(self.now) : len(self.now) + count]
        return [use[0] for use in takewhile(bool, coming) if use]

    def end(self) -> None:
        """End the micro-step."""
        both = 0
        while both < min(len(self.before), len(self.now)) and self.before[both] == self.now[both]:
            both += 1
        self.before, self.expected, self.now = self.now, self.now[:both], []

    def forget(self) -> None:
        """End the micro-step, which will not be finished."""
        self.expected, self.now = [], []


@dataclass
class _Orders:
    """The orders of the micro-steps of one kind."""

    gathers: UseOrder[Any] = field(default_factory=UseOrder)
    sums: UseOrder[Any] = field(default_factory=UseOrder)

    def end(self) -> None:
        self.gathers.end()
        self.sums.end()

    def forget(self) -> None:
        self.gathers.forget()
        self.sums.forget()


class MicroStepOrder:
    """Follows the micro-steps of a model; the module says what is expected of them."""

    def __init__(self) -> None:
        self._orders: dict[tuple[bool, bool], _Orders] = {}  # by whether it trains, and is the first of a window
        self._first = True
        self._training: _Orders | None = None  # of the micro-step that has begun
        self._evaluation: _Orders | None = None
        self._when_over: list[Callable[[], None]] = []

    def follow(self, root: FSDPModule) -> None:
        """Follow the micro-steps of a model."""
        assert isinstance(root, nn.Module)
        root.register_forward_pre_hook(self._begin_forward, prepend=True)
        around_end_of_backward(root, after=self._end_backward)

    def when_over(self, action: Callable[[], None]) -> None:
        """Run ``action`` whenever nothing more is expected: a micro-step has ended, or what it needs has changed."""
        self._when_over.append(action)

    def gathers(self, *, backward: bool) -> UseOrder[Any]:
        """The order of the gathers of the micro-step that runs now.

        Args:
            backward: Whether a backward gathers.
        """
        return self._order(backward=backward).gathers

    def sums(self) -> UseOrder[Any]:
        """The order of the sums of gradients in the backward that runs now."""
        return self._order(backward=True).sums

    def begin_window(self) -> None:
        """Expect nothing more where cached weights are dropped; every rank calls it. A window may begin."""
        self._end_evaluation()
        self._over()
        self._first = True

    def abandon(self) -> None:
        """Forget the micro-steps that have begun."""
        for orders in (self._training, self._evaluation):
            if orders is not None:
                orders.forget()
        self._training = self._evaluation = None
        self.begin_window()

    def _order(self, *, backward: bool) -> _Orders:
        if backward:
            self._end_evaluation()
        if self._evaluation is not None:
            return self._evaluation
        if self._training is None:
            self._training = self._orders.setdefault((True, self._first), _Orders())
        return self._training

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_forward(self, _module: nn.Module, _inputs: Any) -> None:
        self._end_evaluation()
        if not torch.is_grad_enabled():
            self._evaluation = self._orders.setdefault((False, self._first), _Orders())
        self._order(backward=False).gathers.add(None)

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.end()
            self._evaluation, self._first = None, False
            if self._training is None:
                self._over()

    def _end_backward(self) -> None:
        self._end_evaluation()
        if self._training is not None:
            self._training.end()
            self._training, self._first = None, False
        self._over()

    def _over(self) -> None:
        for action in self._when_over:
            action()
