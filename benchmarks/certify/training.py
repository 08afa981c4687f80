"""Faults of the training itself: first weights, cached ones, micro-steps, clipping, and steps of the optimizer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from benchmarks.certify.communicating import name_of
from benchmarks.certify.mutants import UNITS, At, acts, around, chosen
from benchmarks.certify.operators import operator
from benchmarks.certify.storing import unit_of
from lightning_mics import MiCSStrategy
from lightning_mics.sharding import initialization
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.sharding.initialization import InitialWeights
from lightning_mics.sharding.weight_cache import WeightCache
from lightning_mics.techniques.once_per_step import NodeCache, RankCache
from lightning_mics.techniques.parameter_cache import ParameterCache

# -- first weights -----------------------------------------------------------------------------------------------------


@operator(
    "first weights differ", changed=InitialWeights.place, variants=("not sent", 1e-3, 1e-6, 1e-12), ranks=(1, 2, 3)
)
def first_weights(at: At, variant: Any) -> None:
    """Rank ``at.rank`` has its own values, or others by a relative difference."""

    def changed(own: Callable[..., Any], weights: InitialWeights, owner: Any) -> None:
        names = {module: name for name, module in chosen.strategy.lightning_module.named_modules()}
        before = {tensor: tensor.detach().clone() for tensor in owner.parameters()}
        own(weights, owner)
        if at.here(name_of(names.get(owner))):
            acts()
            for tensor, values in before.items():
                if variant == "not sent":
                    tensor.data.copy_(values)
                elif not isinstance(tensor, DTensor):
                    tensor.data.mul_(1 + variant)

    around(InitialWeights, "place", changed)


@operator("first weights differ", changed=InitialWeights.place, units=(None,))
def first_tensors_not_sent(at: At, _variant: None) -> None:
    replaced = types.SimpleNamespace(**vars(dist))
    own = dist.broadcast

    def changed(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.uint8:
            acts()
            return None
        return own(tensor, *args, **kwargs)

    replaced.broadcast = changed
    initialization.dist = replaced  # type: ignore[assignment]


# -- cached weights ----------------------------------------------------------------------------------------------------


def _cache_unit(cache: Any) -> str:
    if isinstance(cache, NodeCache):
        return str(cache.rail._unit)
    return name_of(cache._unsharded._groups[0]._module_fqn)


def _until_next_boundary(at: At) -> bool:
    return at.step is None or chosen.step() in (at.step, at.step + 1)


@operator(
    "stale cached copy",
    changed=ParameterCache.drop_trained,
    variants=("kept", "kept and not compared"),
    steps=(None, 0, 1, 2),
)
def cached_copy(at: At, variant: str) -> None:
    """A unit's copy is used after a step: neither dropped, nor is the weights' version compared, nor perhaps bits."""
    kept: set[int] = set()

    def dropped(own: Callable[..., Any], cache: Any) -> None:
        if at.unit == _cache_unit(cache) and _until_next_boundary(at):
            if cache._cached_version is not None:
                kept.add(id(cache))
        else:
            kept.discard(id(cache))
            own(cache)

    def usable(cache: Any) -> bool:
        valid = bool(own_usable.fget(cache))  # type: ignore[misc]
        stale = not valid and id(cache) in kept and cache._cached_version is not None
        if stale:
            acts()
        return valid or stale

    def compared(own: Callable[..., Any], cache: Any, *args: Any) -> None:
        if variant == "kept" or id(cache) not in kept:
            own(cache, *args)

    own_usable = ParameterCache.usable
    ParameterCache.usable = property(usable)  # type: ignore[method-assign,assignment]
    around(ParameterCache, "compare", compared)
    for kind in (ParameterCache, RankCache):
        around(kind, "drop", dropped)
        around(kind, "drop_trained", dropped)


@operator("stale cached copy", changed=WeightCache.drop_trained, units=(None,), steps=(None, 0, 1, 2))
def caches_of_all_units(at: At, _variant: None) -> None:
    """Caches are not dropped, nor the weights' version compared."""

    def changed(own: Callable[..., Any], cache: WeightCache) -> None:
        if not _until_next_boundary(at):
            own(cache)

    def usable(cache: Any) -> bool:
        valid, kept = bool(own_usable.fget(cache)), cache._cached_version is not None  # type: ignore[misc]
        if kept and not valid:
            acts()
        return kept

    own_usable = ParameterCache.usable
    for method in ("drop_trained", "invalidate"):
        around(WeightCache, method, changed)
    ParameterCache.usable = property(usable)  # type: ignore[method-assign,assignment]


@operator("stale cached copy", changed=FSDPParamGroup.unshard, steps=(None, 1, 2))
def backward_with_older_weights(at: At, _variant: None) -> None:
    """A unit's shard is gathered as it was a step ago, in backward."""
    older: dict[str, list[Tensor]] = {}
    newer: dict[str, tuple[int, list[Tensor]]] = {}

    def changed(own: Callable[..., Any], group: FSDPParamGroup, *args: Any) -> None:
        unit = name_of(group._module_fqn)
        shards = [parameter._sharded_param_data for parameter in group.fsdp_params]
        step, values = newer.get(unit, (-1, []))
        if step != chosen.step():
            older[unit] = values
            newer[unit] = (chosen.step(), [shard.clone() for shard in shards])
        backward = group._training_state == TrainingState.PRE_BACKWARD
        gathers = backward and not group.is_unsharded
        if not (gathers and older.get(unit) and at.here(unit)):
            own(group, *args)
            return
        acts()
        now = [shard.clone() for shard in shards]
        for shard, before in zip(shards, older[unit], strict=True):
            shard.copy_(before)
        own(group, *args)
        for shard, current in zip(shards, now, strict=True):
            shard.copy_(current)

    around(FSDPParamGroup, "unshard", changed)


# -- micro-steps -------------------------------------------------------------------------------------------------------


@operator(
    "micro-step lost or doubled",
    changed=MiCSStrategy.pre_backward,
    variants=(0.0, 2.0, 1 + 1e-9),
    units=(None,),
    steps=(0, 1, 3),
    ranks=(None, 0, 2),
    micro_steps=(0, 1),
)
def micro_step(at: At, variant: float) -> None:
    """Its loss counts so many times."""

    def changed(own: Callable[..., Any], strategy: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if at.here():
            acts()
            loss = loss * variant
        return own(strategy, loss, *args, **kwargs)

    around(MiCSStrategy, "backward", changed)


@operator(
    "boundary at the wrong micro-step",
    changed=AccumulationWindow._set_boundary,
    variants=(True, False),
    units=(None,),
    steps=(None, 0, 1, 2),
)
def boundary(at: At, variant: bool) -> None:
    def changed(own: Callable[..., Any], window: AccumulationWindow, boundary: bool) -> None:
        if boundary != variant and at.here():
            acts()
            boundary = variant
        own(window, boundary)

    around(AccumulationWindow, "_set_boundary", changed)


# -- clipping ----------------------------------------------------------------------------------------------------------


@operator(
    "clipping",
    changed=None,
    variants=("local norm", "dropped", "twice as much", 1 + 1e-9, "without a unit"),
    steps=(None, 0, 2),
)
def clipped(at: At, variant: Any) -> None:
    def changed(own: Callable[..., Any], parameters: Any, most: float, *args: Any, **kwargs: Any) -> Any:
        given = list(parameters)
        if not at.here(at.unit):
            return own(given, most, *args, **kwargs)
        acts()
        gradients = [each.grad for each in given if each.grad is not None]
        if variant == "dropped":
            return None
        if variant == "local norm":
            locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in locals_]))
            for gradient in locals_:
                gradient.mul_(min(1.0, most / (float(norm) + 1e-6)))
            return norm
        if variant == "without a unit":
            names = {each: name for name, each in chosen.strategy.lightning_module.named_parameters()}
            return own([each for each in given if unit_of(names[each]) != at.unit], most, *args, **kwargs)
        return own(given, most * (0.5 if isinstance(variant, str) else variant), *args, **kwargs)

    around(torch.nn.utils, "clip_grad_norm_", changed)


# -- steps of the optimizer --------------------------------------------------------------------------------------------


@operator(
    "a replica apart",
    changed=MiCSStrategy.optimizer_step,
    variants=("one step behind", 1.001, 1 + 1e-9, "weight decay", "step count"),
    units=(None,),
    steps=(None, 0, 1, 3),
    ranks=(0, 1, 2, 3),
)
def step_of_a_rank(at: At, variant: Any) -> None:
    """A rank does not step, or with another learning rate, weight decay or step count."""

    def changed(own: Callable[..., Any], strategy: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        without_effect = variant == "step count" and not optimizer.state
        if without_effect or not at.here():
            return own(strategy, optimizer, *args, **kwargs)
        acts()
        if variant == "step count":
            for parameter in parameters:
                if parameter in optimizer.state:
                    optimizer.state[parameter]["step"] += 1
            return own(strategy, optimizer, *args, **kwargs)
        before = [parameter.detach().to_local().clone() for parameter in parameters]
        rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= variant if isinstance(variant, float) else 1
            group["weight_decay"] = 0.0 if variant == "weight decay" else group["weight_decay"]
        result = own(strategy, optimizer, *args, **kwargs)
        for group, (rate, decay) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        if variant == "one step behind":
            with torch.no_grad():
                for parameter, values in zip(parameters, before, strict=True):
                    parameter.to_local().copy_(values)
        return result

    around(MiCSStrategy, "optimizer_step", changed)


@operator(
    "weights that move by themselves",
    changed=None,
    variants=(1 + 1e-4, 1 + 1e-9),
    units=UNITS,
    steps=(0, 2),
    ranks=(None, 3),
)
def weights_after_a_step(at: At, variant: float) -> None:
    def changed(own: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
        here = at.here(at.unit)
        result = own(strategy, *args, **kwargs)
        with torch.no_grad():
            for name, parameter in strategy.lightning_module.named_parameters() if here else ():
                if unit_of(name) == at.unit and parameter.requires_grad and parameter.to_local().numel():
                    acts()
                    parameter.to_local().mul_(variant)
        return result

    around(MiCSStrategy, "optimizer_step", changed)
