"""Hooks on optimizers: the effects of ``step()`` and ``zero_grad()`` on accumulation window and weight cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_mics._torch.collective_operations import CollectiveOperation
from lightning_mics._torch.fsdp import fsdp_modules, sharded_parameters
from lightning_mics._torch.optimizers.counted_steps import count_collectives_of_steps
from lightning_mics._torch.optimizers.steps import call_after_steps, call_before_steps, call_before_unscaling
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.sharding.optimizers.adapt import adapt_optimizer, how_it_steps, may_send
from lightning_mics.sharding.optimizers.exchange import UnshardedParameters
from lightning_mics.sharding.optimizers.matrix_owners import MatrixOwners
from lightning_mics.sharding.optimizers.offload import Offload
from lightning_mics.sharding.optimizers.whole_matrices import needs_matrices
from lightning_mics.sharding.weight_cache import WeightCache


class OptimizerHooks:
    """Hooks on the optimizers that hold parameters of one sharded model.

    A step drops the weight cache: see [Note: When cached weights are dropped]. Methods enable the other effects.
    torch calls its hooks for all optimizers of a process; they hold this object weakly.

    Args:
        root: The sharded model.
        window: Accumulation window of the model.
        cache: Weight cache of the model.

    Attributes:
        unsharded: Names of the parameters that the model had before it was sharded.
        owners: Owners of matrices, for optimizers that need whole ones.
        count: Counts a collective that an optimizer runs by itself; None counts none.
        offload: Which model states are in host memory.
    """

    def __init__(self, root: FSDPModule, *, window: AccumulationWindow, cache: WeightCache) -> None:
        self._root = root
        self._modules = fsdp_modules(root)
        self._window = window
        self._cache = cache
        self._follows_steps = False
        self.unsharded: UnshardedParameters | None = None
        self.owners: MatrixOwners | None = None
        self.count: Callable[[CollectiveOperation], None] | None = None
        self.offload: Offload = False
        call_before_steps(self._before_step)
        call_after_steps(self._after_step)

    def follow_steps(self) -> None:
        """Close the window before each step and reshard the root after it, for training loops that offer no hooks.

        The root is then sharded after a step even if forwards without a backward came before it. A gradient scaler
        unscales after the window is closed, as gradients are complete only then.
        """
        self._follows_steps = True
        call_before_unscaling(self._before_step)

    def follow_zero_grad(self, optimizer: Optimizer) -> None:
        """Make ``optimizer.zero_grad()`` drop pending gradients of an open window too, as it does on one process."""
        hooks, kind = weakref.ref(self), type(optimizer)

        def zero_all(wrapped: Optimizer, set_to_none: bool = True) -> None:
            alive = hooks()
            if alive is not None and alive._only_pending(wrapped) and alive.trains_with(wrapped):
                alive._window.abandon()
            kind.zero_grad(wrapped, set_to_none)

        # set on the class: Fabric's wrapper inherits from the optimizer's class and ignores attributes of the instance
        optimizer.__class__ = type(
            kind.__name__, (kind,), {"zero_grad": zero_all, "__module__": kind.__module__, "__doc__": kind.__doc__}
        )

    def adopt(self, optimizer: Optimizer) -> str | None:
        """Let ``optimizer`` step on this model: with the shards in place of parameters from before the sharding.

        The same holds for optimizers inside of it, such as the base optimizer of SAM or Lookahead.

        Returns:
            A line for the user on how it steps; None if there is nothing to say.

        Raises:
            TypeError: If its class cannot work on sharded parameters, or on those in host memory.
            ValueError: If it has stepped before the model was sharded, or an option of it does not work with offload.
        """
        inside = [inner for inner in vars(optimizer).values() if isinstance(inner, Optimizer)]
        for inner in inside:
            if _have_one_list(inner, optimizer):  # Accelerate has copied the groups that the two had in common
                inner.param_groups = optimizer.param_groups
        for each in (optimizer, *inside):
            if self.unsharded is not None:
                assert isinstance(self._root, nn.Module)
                self.unsharded.exchange(each, self._root)
            owners = self.owners if self.trains_with(each) else None
            adapt_optimizer(each, owners, offload=self._offload_of(each))
        if self.count is not None and may_send(optimizer) and self.trains_with(optimizer):
            count_collectives_of_steps(optimizer, self.count)
        return how_it_steps(optimizer) if self.trains_with(optimizer) else None

    def trains_with(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds parameters of this model."""
        ours = {id(parameter) for module in self._modules.values() for parameter in sharded_parameters(module)}
        return any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])

    def _before_step(self, optimizer: Optimizer) -> None:
        needs_more = needs_matrices(optimizer) or self.offload
        if needs_more and self.trains_with(optimizer):  # of a loop that has adopted none
            adapt_optimizer(optimizer, self.owners, offload=self._offload_of(optimizer))
        if self._follows_steps and self.trains_with(optimizer) and _changes_weights(optimizer):
            self._window.after_backward()

    def _after_step(self, optimizer: Optimizer) -> None:
        if not (self._cache.enabled or self._follows_steps) or not self.trains_with(optimizer):
            return
        self._cache.follow_step()
        if self._follows_steps:
            self._root.reshard()

    def _offload_of(self, optimizer: Optimizer) -> Offload:
        """Which of its states are on the host: an optimizer around another one, as SAM, works where the weights are."""
        is_around = any(isinstance(inner, Optimizer) for inner in vars(optimizer).values())
        return self.offload if self.offload is True or not is_around else False

    def _only_pending(self, optimizer: Optimizer) -> bool:
        """Whether a window is open and nothing is reduced yet: see [Note: Zero gradients before the boundary].

        False in the ``zero_grad()`` that is not the user's: torch initializes optimizer states by a step with zero
        gradients, and clears these.
        """
        return self._window.is_open and all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _have_one_list(one: Optimizer, other: Optimizer) -> bool:
    """Whether the groups of two optimizers hold their parameters in the same lists."""
    return [id(group["params"]) for group in one.param_groups] == [id(group["params"]) for group in other.param_groups]


def _changes_weights(optimizer: Optimizer) -> bool:
    """Whether a step may change weights; torch initializes optimizer states by a step with a learning rate of zero."""
    return any(bool(group.get("lr", 1) != 0) for group in optimizer.param_groups)
