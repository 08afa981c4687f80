"""Faults of gradients that are pending: between micro-steps, of units that a micro-step skips, and of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from benchmarks.certify.communicating import STEPS, name_of, note_units, reducing
from benchmarks.certify.mutants import At, acts, around, chosen
from benchmarks.certify.operators import operator
from lightning_mics.sharding import accumulation_window
from lightning_mics.techniques.pending_gradients import PendingGradients


def _unit_of(pending: PendingGradients) -> str:
    own = {id(parameter) for parameter in pending._parameters()}
    names = chosen.strategy.lightning_module.named_parameters()
    name = next(name for name, parameter in names if id(parameter) in own)
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "root"


@operator(
    "pending gradients lost or added twice",
    changed=PendingGradients.accumulate,
    variants=("lost", "twice"),
    steps=STEPS,
)
def accumulated(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], pending: PendingGradients, part: Tensor) -> None:
        if at.here(_unit_of(pending)) and part.any():
            acts()
            part = torch.zeros_like(part) if variant == "lost" else 2 * part
        own(pending, part)

    around(PendingGradients, "accumulate", changed)


@operator(
    "pending gradients lost or added twice", changed=PendingGradients.add_into, variants=("lost", "twice"), steps=STEPS
)
def added(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], pending: PendingGradients, part: Tensor) -> None:
        if pending.pending and pending.tensors()[0].any() and at.here(_unit_of(pending)):
            acts()
            before = part.clone()
            own(pending, part)
            part.copy_(before if variant == "lost" else 2 * part - before)
        else:
            own(pending, part)

    around(PendingGradients, "add_into", changed)


@operator(
    "pending gradients lost or added twice",
    changed=_fsdp_collectives.foreach_reduce,
    line="reduce_output += partial_reduce_output",
    variants=("lost", "twice", "left over"),
    steps=STEPS,
)
def partial_sums_of_fsdp2(at: At, variant: str) -> None:
    left: dict[str, Tensor] = {}

    def changed(own: Callable[..., Any], *args: Any) -> Any:
        unit, given = reducing[-1], list(args)
        pending = given[12]  # partial_reduce_output
        if pending is not None and pending.any() and at.here(unit):
            acts()
            given[12] = None if variant == "lost" else pending if variant == "left over" else 2 * pending
            if variant == "left over" and given[11]:  # all_reduce_grads: what is reduced now is pending again
                left[unit] = pending.clone()
        result = list(own(*given))
        if unit in left and given[11]:
            result[-1] = left.pop(unit)
        return tuple(result)

    note_units()
    around(_fsdp_param_group, "foreach_reduce", changed)


@operator(
    "pending gradients lost or added twice",
    changed=FSDPParam.to_accumulated_grad_if_needed,
    variants=("lost", "twice"),
    steps=STEPS,
)
def unsharded_sums_of_fsdp2(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], group: FSDPParamGroup, *args: Any) -> None:
        own(group, *args)
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)
            sums = [parameter.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad]
            for gradient in sums:
                given = gradient is not None and bool(gradient.any())
                if given and not group.reduce_grads and at.here(name_of(group._module_fqn)):
                    acts()
                    gradient.detach().mul_(0 if variant == "lost" else 2)

    around(FSDPParamGroup, "post_backward", changed)


@operator(
    "gradient of an unused block lost",
    changed=accumulation_window.reduce_unused_parameters,
    units=(None,),
    steps=(None, 0),  # where the boundary skips the block and an earlier micro-step does not
)
def unused_parameters_not_as_zeros(at: At, _variant: None) -> None:
    _keep_unused(at, enabled=True)


@operator(
    "gradient of an unused block lost",
    changed=accumulation_window.reduce_unused_parameters,
    units=(None,),
    steps=(None, 2),  # before the window that never uses the block
)
def unused_parameters_as_zeros_to_the_end(at: At, _variant: None) -> None:
    _keep_unused(at, enabled=False)


def _keep_unused(at: At, *, enabled: bool) -> None:
    def changed(own: Callable[..., Any], module: Any, now: bool) -> None:
        if now == enabled and at.here():
            acts()
        else:
            own(module, now)

    around(accumulation_window, "reduce_unused_parameters", changed)


@operator(
    "gradient of an unused block lost",
    changed=_fsdp_collectives.foreach_reduce,
    line="reduce_output += partial_reduce_output",
    units=("blocks.1",),
    steps=STEPS,
)
def unused_unit_not_reduced(at: At, _variant: None) -> None:
    """A unit without gradients of its own in this backward loses those that are pending."""

    def changed(own: Callable[..., Any], group: FSDPParamGroup, *args: Any) -> None:
        unsharded = [getattr(parameter, "_unsharded_param", None) for parameter in group.fsdp_params]
        used = any(each is not None and each.grad is not None for each in unsharded)
        pending = group._partial_reduce_output
        if not used and pending is not None and pending.any() and at.here(name_of(group._module_fqn)):
            acts()
            group._partial_reduce_output = None
        else:
            own(group, *args)

    around(FSDPParamGroup, "post_backward", changed)


@operator("gradient of a unit lost on one rank", changed=FSDPParamGroup.post_backward, steps=STEPS)
def gradients_of_unit(at: At, _variant: None) -> None:
    """A unit's gradients of one micro-step are zero on one rank."""

    def changed(own: Callable[..., Any], group: FSDPParamGroup, *args: Any) -> None:
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)
            gradient = None if unsharded is None else unsharded.grad
            given = gradient is not None and bool(gradient.any())
            if given and dist.get_rank() == 1 and at.here(name_of(group._module_fqn)):
                acts()
                gradient.detach().zero_()
        own(group, *args)

    around(FSDPParamGroup, "post_backward", changed)
