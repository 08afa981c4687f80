"""``allow_unused=True``: ranks use different units in training, as with layer drop, early exit or experts by rank.

Collectives must come in one order on all ranks, and a forward and its backward come in each rank's own. So nothing is
communicated while they run: before the root's forward every unit is gathered, in the order of their names, and kept;
gradients stay unsharded until the backward has ended, and are then reduced in the same order, used or not::

    rank 0    gather root a b c    forward a c    backward c a    reduce root a b c
    rank 1    gather root a b c    forward b      backward b      reduce root a b c

A parameter that some rank has used gets the mean over all ranks, with zeros from those that have not; one that no rank
has used in the window keeps its gradient, which is None after ``zero_grad()``: as with DistributedDataParallel and its
``find_unused_parameters=True``. For this the ranks compare which parameters they have used, on the control plane, once
per step, see [Note: Agreement without waiting].

It takes the memory of ``cache_parameters="rank"`` and ``accumulate_gradients="rank"``, and nothing overlaps. With a
smaller ``cache_parameters`` the units are kept until the end of each backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import ever_unsharded, fsdp_modules
from lightning_mics._torch.units.param_groups import DeferredReductions, around_end_of_backward, gather_and_keep
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.techniques.once_per_step import RankCache


class UnusedUnits:
    """Makes all ranks gather and reduce all units of a model in each micro-step.

    Args:
        root: The sharded model.
        control: Control plane of all ranks.
        caches: Unsharded parameters of each unit, by the fully qualified name of its module; empty where a partition
            group is one rank.
        dropped: Those of the caches that are dropped at the end of each backward.
        before_forward: Called with each unit before a forward, used or not.
    """

    def __init__(
        self,
        root: FSDPModule,
        *,
        control: ControlPlane,
        caches: dict[str, RankCache],
        dropped: Sequence[RankCache],
        before_forward: Callable[[FSDPModule], None],
    ) -> None:
        self._modules = fsdp_modules(root)
        self._control = control
        self._caches = caches
        self._dropped = dropped
        self._before_forward = before_forward
        self._reductions = [DeferredReductions(module) for module in self._modules.values()]
        self._used: list[bool] = []  # [parameters], by this rank since the last boundary
        self._without_gradient: list[nn.Parameter | None] = []  # [parameters], at the beginning of the window
        for reductions in self._reductions:
            reductions.defer()
        around_end_of_backward(root, before=self._end_of_backward, after=self._after_backward)
        assert isinstance(root, nn.Module)
        root.register_forward_pre_hook(self._gather)  # after FSDP2's own: see [Note: Hooks on the root, in order]

    def forget(self) -> None:
        """Forget which parameters were used, when a window is abandoned."""
        self._used, self._without_gradient = [], []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gather(self, _module: nn.Module, _inputs: Any) -> None:
        for name, module in self._modules.items():
            cache = self._caches.get(name)
            if not ever_unsharded(module) or (cache is not None and not cache.usable):
                gather_and_keep(module)
            self._before_forward(module)

    def _end_of_backward(self) -> None:
        """Reduce what the window reduces now, in the order of names; nothing before the boundary, if it accumulates."""
        used = [bit for reductions in self._reductions for bit in reductions.used()]
        self._used = [a or b for a, b in zip(self._used or used, used, strict=True)]
        parameters = [parameter for reductions in self._reductions for parameter in reductions.parameters()]
        if not self._without_gradient:
            self._without_gradient = [parameter if parameter.grad is None else None for parameter in parameters]
        at_boundary = any(reductions.at_boundary for reductions in self._reductions)
        for reductions in self._reductions:
            reductions.reduce()
        if at_boundary:
            self._remove_zeros()

    def _remove_zeros(self) -> None:
        """Set the gradients of parameters that no rank has used to None again."""
        by_any = self._control.largest(torch.tensor(self._used, dtype=torch.uint8)).tolist()
        for used, parameter in zip(by_any, self._without_gradient, strict=True):
            if not used and parameter is not None:
                parameter.grad = None
        self.forget()

    def _after_backward(self) -> None:
        if torch.is_grad_enabled():  # create_graph=True: another backward needs the same weights
            return
        for cache in self._dropped:
            cache.drop()
