"""Accumulation windows: which reductions run in a micro-step, and which gradients are pending until the boundary.

A window is the micro-steps from one gradient accumulation boundary to the next, the boundary included::

    micro-step            1         2         3      4 = boundary
    reduced               hop 1     hop 1     hop 1  hop 1, hop 2
    pending after it      sums      sums      sums   -

Which part of hop 1 runs before the boundary depends on where gradients are accumulated: see
:mod:`~lightning_mics.techniques.once_per_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import (
    drop_partial_sums,
    drop_unreduced_gradients,
    ever_unsharded,
    finish_backward,
    forget_iteration,
    fsdp_modules,
    has_pending_gradients,
    reduce_unused_parameters,
    trainable,
)
from lightning_mics._torch.parameter_hooks import ParameterHooks
from lightning_mics.sharding.direct_gradients import DirectGradients
from lightning_mics.sharding.ranks.never_used import NeverUsed
from lightning_mics.sharding.weight_cache import WeightCache
from lightning_mics.techniques.pending_gradients import PendingGradients


class AccumulationWindow:
    """The open accumulation window of a sharded model, if there is one.

    Without a call of :meth:`micro_step` every backward is a boundary, as in FSDP2 itself.

    A parameter group with pending gradients is reduced at the boundary even if the boundary's own forward did not use
    it; its parameters without a gradient count as zero: see [Note: Zero gradients before the boundary]. Those that
    nothing in the window used keep ``grad=None``. The parameter groups used may differ from micro-step to micro-step,
    but not from rank to rank.

    Args:
        root: The sharded model.
        cache: Weight cache, dropped at both ends of a window: see [Note: When cached weights are dropped].
        pending_gradients: Gradients accumulated in addition to FSDP2's own, by the fully qualified name of the FSDP
            module; empty where FSDP2 accumulates all of them.
        replicas: Number of replicas; with one there is no hop 2.
        unsharded_gradients: Whether FSDP2 accumulates unsharded gradients until the boundary, and runs hop 1 there.
        two_hop: Whether hop 2 runs at the boundary only; False runs it in every micro-step, as hybrid sharding does.

    Attributes:
        never_used: Removes zero gradients of parameters that nothing used; None where there are none, or others do.
    """

    def __init__(
        self,
        root: FSDPModule,
        *,
        cache: WeightCache,
        pending_gradients: Mapping[str, PendingGradients],
        replicas: int,
        unsharded_gradients: bool,
        two_hop: bool,
    ) -> None:
        self._root = root
        self._modules = fsdp_modules(root)
        self._cache = cache
        self._pending_gradients = dict(pending_gradients)
        self._unsharded_gradients = unsharded_gradients
        self._two_hop = two_hop
        self._defers = two_hop and (replicas > 1 or bool(self._pending_gradients) or unsharded_gradients)
        self._at_boundary = True
        self._is_open = False
        self._adds_zeros = False  # to gradients of the window
        self.never_used: NeverUsed | None = None
        self._when_abandoned: list[Callable[[], None]] = []
        self.direct_gradients = DirectGradients(root, lambda: self._at_boundary)
        self._ever_trainable = {name: trainable(module) for name, module in self._modules.items()}
        self._hooks = {m: ParameterHooks(m, at_boundary=lambda: self._at_boundary) for m in self._modules.values()}

    @property
    def is_open(self) -> bool:
        """Whether a micro-step of the window has begun and its boundary has not ended."""
        return self._is_open

    @property
    def at_boundary(self) -> bool:
        """Whether a micro-step that runs now is the gradient accumulation boundary."""
        return self._at_boundary

    @contextmanager
    def micro_step(self, *, boundary: bool) -> Iterator[None]:
        """Run the forward and backward of one micro-step inside; opens the window if it is the first.

        Raises:
            RuntimeError: See :meth:`after_backward`.
        """
        self._open()
        self._set_boundary(boundary)
        try:
            yield
            self.after_backward()
        finally:
            self._set_boundary(True)

    def before_forward(self, module: FSDPModule) -> None:
        """Defer reductions of ``module``, if its forward is one before the boundary; share its parameters' hooks.

        Runs in a hook: see [Note: Hooks on the root, in order].
        """
        self._hooks[module].share()
        if not (self._defers and not self._at_boundary and torch.is_grad_enabled()):
            return
        if self._unsharded_gradients:  # not earlier: FSDP2 reads gradients of parameters that were never unsharded
            module.set_requires_gradient_sync(False, recurse=False)
        else:
            reduce_unused_parameters(module, True)
            if not self._adds_zeros and self.never_used is not None:
                self.never_used.begin()
            self._adds_zeros = True

    def before_backward(self) -> None:
        """Do not defer reductions of parameter groups in which some parameters are frozen for this backward only.

        The pending gradients of a parameter group are one flat tensor, so all must be of the same parameters. Call it
        before a backward if ``requires_grad`` changes inside accumulation windows, as when optimizers take turns.

        Raises:
            RuntimeError: If such a group has pending gradients already.
        """
        if self._unsharded_gradients:  # each parameter has a gradient of its own until the boundary
            return
        for name, module in self._modules.items():
            now = trainable(module)
            ever_trainable = [a or b for a, b in zip(self._ever_trainable[name], now, strict=True)]
            self._ever_trainable[name] = ever_trainable
            if now == ever_trainable or not any(now):
                continue
            if self._pending(name):
                raise RuntimeError(
                    f"{name or 'the root'} has parameters that were trainable earlier in this accumulation window and "
                    "are frozen now; switch `requires_grad` (`toggle_model`) in all micro-steps of a window or none"
                )
            module.set_requires_all_reduce(True, recurse=False)
            if name in self._pending_gradients:
                self._pending_gradients[name].at_boundary = True

    def after_reductions(self) -> None:
        """Remove zero gradients that a reduction at the boundary has left; runs where FSDP2 ends a backward."""
        if self._at_boundary and self._adds_zeros and self.never_used is not None:
            self.never_used.remove_zeros(self.direct_gradients.parameters)

    def after_backward(self) -> None:
        """Close the window if the backward that has just run was its boundary.

        :meth:`micro_step` calls it; call it where a boundary runs outside of one. Before the boundary it removes zero
        gradients: see [Note: Zero gradients before the boundary].

        Raises:
            RuntimeError: If gradients are still pending, or weights changed unrecorded while they were cached, now or
                before an earlier step.
        """
        if not self._at_boundary:
            for name, pending_gradients in self._pending_gradients.items():
                pending_gradients.remove_zeros()
                drop_partial_sums(self._modules[name])  # zeros as well
            return
        self.direct_gradients.merge()
        still_pending = [name for name, m in self._modules.items() if self._pending(name) and any(trainable(m))]
        if still_pending:
            names = ", ".join(name or "the root" for name in still_pending)
            raise RuntimeError(
                f"{names} got gradients earlier in this accumulation window and none at its boundary; run the last "
                "backward of a window as its boundary, outside of `no_backward_sync` or `no_sync`; after an exception "
                "in a backward, drop what it has left with `schedule.window.abandon()` on all ranks"
            )
        self._cache.check_unchanged()
        self._close()

    def abandon(self) -> None:
        """Drop the pending gradients of an unfinished window, so that they cannot leak into the next one.

        Does not communicate.
        """
        forget_iteration(self._root)
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.drop()
        self.direct_gradients.drop()
        for module in self._modules.values():
            drop_unreduced_gradients(module)
        self._cache.forget_comparisons()
        self._cache.free()
        for action in self._when_abandoned:
            action()
        self._close()

    def when_abandoned(self, action: Callable[[], None]) -> None:
        """Run ``action`` whenever a window is abandoned."""
        self._when_abandoned.append(action)

    def reduce_pending_gradients(self) -> None:
        """Reduce pending gradients after a backward before the boundary, as the boundary would; the window stays open.

        Every rank calls it. Later gradients of the window are added to these.
        """
        if not any(map(self._pending, self._modules)):
            return
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.remove_zeros()
        at_boundary = self._at_boundary
        self._set_boundary(True)
        finish_backward(self._root)
        self._set_boundary(at_boundary)

    def drop_pending_gradients(self) -> None:
        """Drop gradients that are pending until the boundary; the window stays open. Does not communicate."""
        if not self._is_open:
            return
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.drop()
        for module in self._modules.values():
            drop_unreduced_gradients(module)
            drop_partial_sums(module)

    def accumulate_in(self, name: str, pending_gradients: PendingGradients) -> None:
        """Accumulate the gradients of a module in addition to FSDP2's own from now on; no window is open.

        Args:
            name: Fully qualified name of the FSDP module.
            pending_gradients: Where they are accumulated.
        """
        self._pending_gradients[name] = pending_gradients

    def tensors(self) -> list[Tensor]:
        """Gradients pending now in addition to FSDP2's own, each [any]."""
        return [tensor for pending in self._pending_gradients.values() for tensor in pending.tensors()]

    def _open(self) -> None:
        if not self._is_open:
            self._cache.drop_trained()
        self._is_open = True

    def _close(self) -> None:
        self._is_open = self._adds_zeros = False
        if self.never_used is not None:
            self.never_used.end()
        self._cache.drop_trained()
        for name, module in self._modules.items():
            if not self._pending(name):  # a frozen parameter group may have a window of its own, still open
                reduce_unused_parameters(module, False)

    def _set_boundary(self, boundary: bool) -> None:
        self._at_boundary = boundary
        for module in self._modules.values():
            if self._unsharded_gradients:
                module.set_requires_gradient_sync(boundary or not ever_unsharded(module), recurse=False)
            else:
                module.set_requires_all_reduce(boundary or not self._two_hop, recurse=False)
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.at_boundary = boundary or not self._two_hop

    def _pending(self, name: str) -> bool:
        return has_pending_gradients(self._modules[name]) or (
            name in self._pending_gradients and self._pending_gradients[name].pending
        )
