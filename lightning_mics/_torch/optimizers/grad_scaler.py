"""A ``GradScaler`` for sharded gradients: it skips a step on all ranks or on none.

``torch.amp.GradScaler`` (torch 2.11 to 2.13) unscales DTensors, but agrees on an overflow inside their partition group
only, once for each dtype of gradients. Of the methods overridden here these are private in torch: ``_unscale_grads_``,
``_maybe_opt_step``, ``_lazy_init_scale_growth_tracker``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_mics._torch.dtensors.owned_rows import elements_here
from lightning_mics._torch.optimizers.steps import call_as_stepped, call_as_unscaled

SKIPPED = "skipped_steps"  # key in the state of a scaler, beside those of torch


class ShardedGradScaler(GradScaler):
    """A scaler whose overflows are found on the shards of this rank, and agreed on once per step of an optimizer.

    Made of a ``GradScaler`` by :func:`agree_on_overflows`.
    """

    _agree: Callable[[Tensor], None]
    skipped: Tensor | int = 0  # optimizer steps that were skipped for an overflow; on the device

    @property
    def current_scale(self) -> Tensor | float:
        """The scale, on the device once there is one."""
        return self._init_scale if self._scale is None else self._scale

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless gradients have overflown on any rank; every rank calls it. Counts what is skipped.

        Args:
            optimizer: Optimizer to step.
            args: Arguments of its step.
            kwargs: Keyword arguments of its step.
        """
        output = super().step(optimizer, *args, **kwargs)
        if self.is_enabled():
            (found_inf,) = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            # on the device: a fused step does not wait for it
            self.skipped = self.skipped + (found_inf > 0).long().sum()
        return output

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's scaler, which loads it too, and the number of skipped steps."""
        state = super().state_dict()
        return {**state, SKIPPED: int(self.skipped)} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this scaler, or of torch's.

        Args:
            state_dict: State to load.
        """
        super().load_state_dict(state_dict)
        self.skipped = int(state_dict.get(SKIPPED, 0))

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        if self._growth_tracker is None:  # Accelerate (1.15) calls it after each loading, and torch's raises then
            super()._lazy_init_scale_growth_tracker(dev)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        call_as_unscaled(optimizer)
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.dtype == torch.float16 and not allow_fp16:
                    raise ValueError("Attempting to unscale FP16 gradients.")
                by_dtype[gradient.dtype].append(elements_here(gradient))
        found = found_inf.view(())  # torch's scaler for FSDP1 passes [1]
        with torch.no_grad():
            for gradients in by_dtype.values():
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inv_scale)
            self._agree(found)
        return {found_inf.device: found_inf}

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Step, or do what the sharded model does around a step without it: a skipped one ends its window as well."""
        if any(found_inf.item() for found_inf in optimizer_state["found_inf_per_device"].values()):
            call_as_stepped(optimizer)
            return None
        return optimizer.step(*args, **kwargs)


def agree_on_overflows(scaler: GradScaler, agree: Callable[[Tensor], None]) -> None:
    """Make a scaler one for sharded gradients, in place: it stays the object that its owner holds, and of its class.

    Args:
        scaler: The scaler, of ``torch.amp`` or a class that inherits from its.
        agree: Function that takes whether this rank has found an overflow, [] of 0 or 1, and replaces it by whether any
            rank has; without waiting for the device.
    """
    kind = type(scaler)
    if not isinstance(scaler, ShardedGradScaler):
        scaler.__class__ = (
            ShardedGradScaler if kind is GradScaler else type(kind.__name__, (ShardedGradScaler, kind), {})
        )
    vars(scaler)["_agree"] = agree
