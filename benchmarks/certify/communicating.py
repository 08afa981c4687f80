"""Faults of communication: reductions and gathers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from benchmarks.certify.mutants import At, acts, around
from benchmarks.certify.operators import operator
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.techniques.hierarchical import HierarchicalReduceScatter

FACTORS = (2.0, 0.5, 1 + 1e-6, 1 + 1e-9)
STEPS = (None, 0, 1, 2)
reducing: list[str] = []  # the unit whose gradients are reduced now


def name_of(fully_qualified: str | None) -> str:
    """The unit of a module's name; the root's is empty.

    Args:
        fully_qualified: Name of the module, perhaps None before the first forward.
    """
    return fully_qualified or "root"


def note_units() -> None:
    """Have :data:`reducing` end with the unit whose backward ends now."""

    def noted(own: Callable[..., None], group: Any, *args: Any) -> None:
        reducing.append(name_of(group._module_fqn))
        try:
            own(group, *args)
        finally:
            reducing.pop()

    around(FSDPParamGroup, "post_backward", noted)


# -- hop 2 of FSDP2 ----------------------------------------------------------------------------------------------------


@operator(
    "all-reduce dropped or doubled",
    changed=_fsdp_collectives.foreach_reduce,
    line="dist.all_reduce(",
    variants=("drop", "twice"),
    steps=STEPS,
)
def hop_2(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        times = {"drop": 0, "twice": 2}[variant]
        here = at.here(reducing[-1])
        for _ in range(times if here else 1):
            own(tensor, *args, **kwargs)
        if here:
            acts()

    _replace_all_reduce(changed)


@operator(
    "clip before the second hop", changed=_fsdp_collectives.foreach_reduce, line="dist.all_reduce(", steps=(None, 0, 1)
)
def clipped_before_hop_2(at: At, _variant: None) -> None:
    def changed(own: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        if at.here(reducing[-1]):
            largest = tensor.norm().item() / 2
            tensor.mul_(largest / (tensor.norm().item() + 1e-6))
            acts()
        own(tensor, *args, **kwargs)

    _replace_all_reduce(changed)


@operator(
    "wrong reduce dtype",
    changed=_fsdp_collectives.foreach_reduce,
    line="dist.all_reduce(",
    variants=(torch.float32, torch.bfloat16),
    steps=(None, 1),
)
def hop_2_in(at: At, variant: torch.dtype) -> None:
    def changed(own: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        own(tensor, *args, **kwargs)
        if at.here(reducing[-1]):
            tensor.copy_(tensor.to(variant))
            acts()

    _replace_all_reduce(changed)


def _replace_all_reduce(change: Callable[..., Any]) -> None:
    note_units()
    own: Any = _fsdp_collectives.dist
    replaced = types.SimpleNamespace(**vars(own))
    replaced.all_reduce = lambda *args, **kwargs: change(own.all_reduce, *args, **kwargs)
    _fsdp_collectives.dist = replaced  # type: ignore[assignment]


# -- reductions and gathers of this package ----------------------------------------------------------------------------


@operator("wrong factor", changed=CountedGroup.reduce_scatter, variants=FACTORS, steps=STEPS)
def sums_scaled(at: At, variant: float) -> None:
    def changed(own: Callable[..., Any], group: CountedGroup, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = own(group, output, *args, **kwargs)
        if at.here(group._unit):
            if work is not None:
                work.wait()
            output.mul_(variant)
            acts()
        return work

    around(CountedGroup, "reduce_scatter", changed)


@operator(
    "wrong factor",
    changed=_fsdp_collectives._get_gradient_divide_factors,
    variants=("before", "after", "one rank less"),
    units=(None,),
    steps=STEPS,
)
def divisor_of_fsdp2(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], *args: Any) -> Any:
        before, after, scatter, reduce = own(*args)
        if at.here():
            acts()
            if variant == "before":
                before = 2 * (before or 1)
            elif variant == "after":
                after = 2 * (after or 1)
            else:
                after = (after or 1) * 3 / 4
        return before, after, scatter, reduce

    around(_fsdp_collectives, "_get_gradient_divide_factors", changed)


@operator(
    "wrong reduce dtype",
    changed=CountedGroup.reduce_scatter,
    variants=(torch.float32, torch.bfloat16),
    steps=(None, 0, 2),
)
def reduced_in(at: At, variant: torch.dtype) -> None:
    def changed(
        own: Callable[..., Any], group: CountedGroup, output: Tensor, source: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if at.here(group._unit):
            source.copy_(source.to(variant))
            acts()
        return own(group, output, source, *args, **kwargs)

    around(CountedGroup, "reduce_scatter", changed)


@operator("wrong reduce dtype", changed=CountedGroup.all_gather, variants=(torch.float32,), steps=(None, 1))
def gathered_in(at: At, variant: torch.dtype) -> None:
    def changed(own: Callable[..., Any], group: CountedGroup, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = own(group, output, *args, **kwargs)
        if at.here(group._unit):
            if work is not None:
                work.wait()
            output.copy_(output.to(variant))
            acts()
        return work

    around(CountedGroup, "all_gather", changed)


@operator(
    "shards in the wrong order",
    changed=CountedGroup.all_gather,
    variants=("first two", "rotated"),
    steps=STEPS,
    ranks=(None, 1),
)
def order_of_gathered(at: At, variant: str) -> None:
    def changed(own: Callable[..., Any], group: CountedGroup, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = own(group, output, *args, **kwargs)
        if at.here(group._unit):
            if work is not None:
                work.wait()
            output.copy_(_other_order(output, group.size, variant))
            acts()
        return work

    around(CountedGroup, "all_gather", changed)


@operator(
    "shards in the wrong order", changed=CountedGroup.reduce_scatter, variants=("first two", "rotated"), steps=STEPS
)
def order_of_reduced(at: At, variant: str) -> None:
    def changed(
        own: Callable[..., Any], group: CountedGroup, output: Tensor, source: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if at.here(group._unit):
            source.copy_(_other_order(source, group.size, variant))
            acts()
        return own(group, output, source, *args, **kwargs)

    around(CountedGroup, "reduce_scatter", changed)


def _other_order(gathered: Tensor, ranks: int, variant: str) -> Tensor:
    chunks = list(gathered.clone().chunk(ranks))
    chunks = [*chunks[1:], chunks[0]] if variant == "rotated" else [chunks[1], chunks[0], *chunks[2:]]
    return torch.cat(chunks)


@operator("all-reduce dropped or doubled", changed=HierarchicalReduceScatter.reduce_along_rail, steps=STEPS)
def rail_not_reduced(at: At, _variant: None) -> None:
    def changed(own: Callable[..., Any], stages: Any, output: Tensor, rail_slice: Tensor, *args: Any, **kw: Any) -> Any:
        if not at.here(stages.rail._unit):
            return own(stages, output, rail_slice, *args, **kw)
        acts()
        output.copy_(rail_slice.chunk(stages.rail.size)[stages.rail.rank])
        return None

    around(HierarchicalReduceScatter, "reduce_along_rail", changed)


@operator("all-reduce dropped or doubled", changed=HierarchicalReduceScatter.reduce_in_node, steps=STEPS)
def node_not_reduced(at: At, _variant: None) -> None:
    def changed(own: Callable[..., Any], stages: Any, unsharded: Tensor, group: Any, op: Any) -> Any:
        if not at.here(stages.rail._unit):
            return own(stages, unsharded, group, op)
        acts()
        return stages.rail_slice(unsharded, group)

    around(HierarchicalReduceScatter, "reduce_in_node", changed)
