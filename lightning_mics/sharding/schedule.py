"""Which hops run in a micro-step, and what is cached or pending until the boundary."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_mics._torch.fsdp import (
    deferred_sums,
    drop_unreduced_gradients,
    ever_gathered,
    forget_iteration,
    fsdp_modules,
    reduce_unused_parameters,
    reduces_unused_parameters,
    sharded_parameters,
    trainable,
)
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.techniques.once_per_step import ParameterCache
from lightning_mics.techniques.pending_gradients import PendingGradients


class AccumulationSchedule:
    """Decides for every micro-step which hops run.

    Without a call of :meth:`micro_step` every backward is a boundary, as in plain FSDP2.

    A block whose sums wait is reduced at the boundary even if the boundary's own forward skips it: otherwise they would
    stay behind. A parameter of such a block without a gradient counts as zero. Blocks that no forward of the window
    uses keep ``grad=None``. The blocks used may differ from micro-step to micro-step, not from rank to rank.

    Where copies of gathered weights are kept they live from the first gather of a window to its boundary, or inside
    :meth:`cached_weights`. Weights may change at any other time by any means. Inside, a copy is dropped when torch
    knows of the change: in-place operations, optimizers, ``load_state_dict``. After a change that it does not know of
    (through ``.data``, ``torch._foreach_*`` functions or raw memory) call :meth:`invalidate_cache`; the boundary
    refuses to go on with what was computed otherwise.

    Args:
        root: The sharded model, from :func:`lightning_mics.sharding.shard_model.shard_model`.
        replicas: How many there are; with one there is no second hop.
        traffic: What the collectives of all units have sent.
        pending_gradients: What units keep back beside FSDP2's own sums, by the unit's name.
        copies: The kept copies of weights.
        whole_gradients: Hop 1 waits for the boundary as well, and FSDP2 adds up whole gradients until then.
        two_hop: False runs hop 2 in every micro-step too, as hybrid sharding by itself does.
    """

    def __init__(
        self,
        root: FSDPModule,
        *,
        replicas: int,
        traffic: Traffic,
        pending_gradients: Mapping[str, PendingGradients] | None = None,
        copies: Sequence[ParameterCache] = (),
        whole_gradients: bool = False,
        two_hop: bool = True,
    ) -> None:
        self.traffic = traffic
        self._root = root
        self._modules = fsdp_modules(root)
        self._pending_gradients = dict(pending_gradients or {})
        self._copies = copies
        self._whole_gradients = whole_gradients
        self._two_hop = two_hop
        self._defers = two_hop and (replicas > 1 or bool(self._pending_gradients) or whole_gradients)
        self._at_boundary = True
        self._in_window = False
        self._weights_cached = False
        self._ever_trainable = {name: trainable(module) for name, module in self._modules.items()}
        for module in self._modules.values():
            assert isinstance(module, nn.Module)
            module.register_forward_pre_hook(self._take_part_in_reductions)
        if copies:
            self._watch_for_changes()

    @contextmanager
    def micro_step(self, *, boundary: bool) -> Iterator[None]:
        """Run the forward and backward of one micro-step; hop 2 runs only if it is the ``boundary``.

        Raises:
            RuntimeError: After a boundary, if sums stayed behind that this torch version cannot reduce, or weights
                changed unnoticed while copies of them were in use.
        """
        self._open_window()
        self._set_boundary(boundary)
        try:
            yield
            self.after_backward()
        finally:
            self._set_boundary(True)

    @contextmanager
    def cached_weights(self) -> Iterator[None]:
        """Promise that weights do not change inside, as in an evaluation: each crosses nodes once, not once per use.

        Raises:
            RuntimeError: At the end, if they did, unnoticed.
        """
        self.invalidate_cache()
        before, self._weights_cached = self._weights_cached, True
        try:
            yield
            self._refuse_outdated_copies()
        finally:
            self._weights_cached = before
            self.invalidate_cache()

    def invalidate_cache(self) -> None:
        """Drop what is kept of the weights; every rank calls it. The next use gathers them across nodes again."""
        for copy in self._copies:
            copy.drop()

    def kept(self) -> list[Tensor]:
        """What is in memory now so that it travels once per step: copies of parameters, and sums of gradients."""
        keepers: list[ParameterCache | PendingGradients] = [*self._copies, *self._pending_gradients.values()]
        return [tensor for keeper in keepers for tensor in keeper.tensors()]

    def before_backward(self) -> None:
        """Reduce at once what cannot wait: blocks of which some parameters are frozen for this backward only.

        A block's deferred gradients are added up as one flat tensor, so all must be of the same parameters. Call it
        before a backward if ``requires_grad`` changes inside accumulation windows, as when optimizers take turns.

        Raises:
            RuntimeError: If such a block has sums that wait already.
        """
        if self._whole_gradients:  # each has a gradient of its own until the boundary
            return
        for name, module in self._modules.items():
            now = trainable(module)
            ever_trainable = [a or b for a, b in zip(self._ever_trainable[name], now, strict=True)]
            self._ever_trainable[name] = ever_trainable
            if now == ever_trainable or not any(now):
                continue
            if self._sums_wait(name):
                raise RuntimeError(
                    f"{name or 'the root'} has parameters that were trainable earlier in this accumulation window and "
                    "are frozen now; switch `requires_grad` (`toggle_model`) in all micro-steps of a window or none"
                )
            module.set_requires_all_reduce(True, recurse=False)
            if name in self._pending_gradients:
                self._pending_gradients[name].at_boundary = True

    def after_backward(self) -> None:
        """Close the accumulation window if the backward that has just run was its boundary.

        :meth:`micro_step` calls it; call it where a boundary runs outside of one.

        Raises:
            RuntimeError: If sums stayed behind that this torch version cannot reduce (before 2.13), or weights changed
                unnoticed while copies of them were in use.
        """
        if not self._at_boundary:
            for pending_gradients in self._pending_gradients.values():
                pending_gradients.remove_zeros()
            return
        left_behind = [name for name, m in self._modules.items() if self._sums_wait(name) and any(trainable(m))]
        if left_behind:
            names = ", ".join(name or "the root" for name in left_behind)
            old = not reduces_unused_parameters(self._root)
            raise RuntimeError(
                f"{names} got gradients earlier in this accumulation window and none at its boundary; "
                + (
                    f"reducing them needs torch >= 2.13, this is torch {torch.__version__}"
                    if old
                    else "run the last backward of a window as its boundary, outside of `no_backward_sync` or `no_sync`"
                )
            )
        self._refuse_outdated_copies()
        self._close_window()

    def follow_steps(self) -> None:
        """Let steps of this model's optimizers close windows, for loops that tell nobody of their backwards.

        After a step the root is not gathered, however many forwards without a backward came before it.
        """
        schedule = weakref.ref(self)

        def close_before_step(optimizer: Optimizer, *_: Any) -> None:
            if (alive := schedule()) is not None and alive.trains_with(optimizer) and _changes_weights(optimizer):
                alive.after_backward()

        def reshard_after_step(optimizer: Optimizer, *_: Any) -> None:
            if (alive := schedule()) is not None and alive.trains_with(optimizer):
                alive._root.reshard()

        for handle in (
            register_optimizer_step_pre_hook(close_before_step),
            register_optimizer_step_post_hook(reshard_after_step),
        ):
            weakref.finalize(self, handle.remove)

    def follow_zero_grad(self, optimizer: Optimizer) -> None:
        """Let ``optimizer.zero_grad()`` drop what an open window has accumulated too, as it does on one process."""
        schedule, kind = weakref.ref(self), type(optimizer)

        def zero_all(wrapped: Optimizer, set_to_none: bool = True) -> None:
            alive = schedule()
            waiting = all(p.grad is None for group in wrapped.param_groups for p in group["params"])
            if alive is not None and alive._in_window and waiting and alive.trains_with(wrapped):
                alive.abandon_window()  # with gradients there torch makes states, by a step that is none
            kind.zero_grad(wrapped, set_to_none)

        # a class, for Fabric's wrapper of an optimizer inherits from it and does not look into the instance
        optimizer.__class__ = type(
            kind.__name__, (kind,), {"zero_grad": zero_all, "__module__": kind.__module__, "__doc__": kind.__doc__}
        )

    def abandon_window(self) -> None:
        """Drop what an unfinished window has accumulated, so that it cannot leak into the next one.

        Dropping is local: no rank waits for another.
        """
        forget_iteration(self._root)
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.drop()
        for module in self._modules.values():
            drop_unreduced_gradients(module)
        for copy in self._copies:
            copy.take_differs()
        self._close_window()

    def _open_window(self) -> None:
        if not self._in_window:
            self.invalidate_cache()
        self._in_window = True

    def _close_window(self) -> None:
        self._in_window = False
        self.invalidate_cache()
        for name, module in self._modules.items():
            if not self._sums_wait(name):  # a frozen block may have a window of its own, still open
                reduce_unused_parameters(module, False)

    def _set_boundary(self, boundary: bool) -> None:
        self._at_boundary = boundary
        for module in self._modules.values():
            if self._whole_gradients:
                module.set_requires_gradient_sync(boundary or not ever_gathered(module), recurse=False)
            else:
                module.set_requires_all_reduce(boundary or not self._two_hop, recurse=False)
        for pending_gradients in self._pending_gradients.values():
            pending_gradients.at_boundary = boundary or not self._two_hop

    def _sums_wait(self, name: str) -> bool:
        return deferred_sums(self._modules[name]) or (
            name in self._pending_gradients and self._pending_gradients[name].pending
        )

    def _refuse_outdated_copies(self) -> None:
        differ = [differs for copy in self._copies if (differs := copy.take_differs()) is not None]
        if differ and bool(torch.stack(differ).any()):
            raise RuntimeError(
                "weights changed, in a way that torch does not notice (through `.data`, `torch._foreach_*` or raw "
                "memory), while a copy of them was in use; call `invalidate_cache()` after such a change, on all "
                "ranks, or make it between optimizer steps"
            )

    def _watch_for_changes(self) -> None:
        """Copies are dropped before each forward that nothing says to share weights, and after optimizers step."""
        root = self._root
        assert isinstance(root, nn.Module)
        root.register_forward_pre_hook(self._drop_unless_cached, prepend=True)  # before FSDP2's own, which gathers
        schedule = weakref.ref(self)

        def drop_after_step(optimizer: Optimizer, *_: Any) -> None:
            if (alive := schedule()) is not None and alive.trains_with(optimizer):
                alive.invalidate_cache()

        handle = register_optimizer_step_post_hook(drop_after_step)
        weakref.finalize(self, handle.remove)

    def trains_with(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds parameters of this model."""
        ours = {id(parameter) for module in self._modules.values() for parameter in sharded_parameters(module)}
        return any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drop_unless_cached(self, _module: nn.Module, _inputs: Any) -> None:
        if not (self._in_window or self._weights_cached):
            self.invalidate_cache()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_part_in_reductions(self, module: nn.Module, _inputs: Any) -> None:
        deferring = self._defers and not self._at_boundary
        if not (deferring and torch.is_grad_enabled() and isinstance(module, FSDPModule)):
            return
        if self._whole_gradients:  # not before: FSDP2 looks for the gradients of what it has never gathered
            module.set_requires_gradient_sync(False, recurse=False)
        else:
            reduce_unused_parameters(module, True)


def _changes_weights(optimizer: Optimizer) -> bool:
    """Whether a step may; torch makes the states of an optimizer that has none by a step at a rate of zero."""
    return any(bool(group.get("lr", 1) != 0) for group in optimizer.param_groups)
