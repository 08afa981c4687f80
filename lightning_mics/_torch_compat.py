"""Differences between torch versions, and every private path of torch that this package uses.

torch 2.13 is what the package is developed on. torch 2.11 and 2.12 run it where a partition group stays in one node;
the checks here say what needs the newer version.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# FSDP2's communication interface has no public path yet (https://github.com/pytorch/pytorch/pull/155189).
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

__all__ = ["AllGather", "ReduceScatter"]

HAS_UNSORTED_GROUPS = hasattr(dist, "all_gather_single")  # `sort_ranks` came with it, in 2.13


def new_group(ranks: tuple[int, ...], *, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make the process group of ``ranks`` in the given order; only its members need to call.

    Raises:
        RuntimeError: If the order is not ascending and torch is older than 2.13, whose groups are always sorted.
    """
    kwargs: dict[str, Any] = {}
    if list(ranks) != sorted(ranks):
        if not HAS_UNSORTED_GROUPS:
            raise RuntimeError(
                f"a partition group that spans nodes needs torch >= 2.13, this is torch {torch.__version__}: "
                "upgrade torch, or use a partition_size that stays inside one node"
            )
        kwargs["sort_ranks"] = False
    group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, **kwargs)
    assert isinstance(group, dist.ProcessGroup)  # the caller is a member
    return group


def premultiplied_sum_factor(op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> float | None:
    """The factor of a pre-multiplied sum, or None for any other reduction."""
    if op != dist.ReduceOp.PREMUL_SUM:
        return None
    state: Any = op.__getstate__()  # (kind, factor); the factor has no public getter
    return float(state[1])


def deferred_sums(module: FSDPModule) -> bool:
    """Whether ``module`` itself holds gradient sums that still wait for the all-reduce over replicas."""
    return any(group._partial_reduce_output is not None for group in _param_groups(module))


def trainable(module: FSDPModule) -> list[bool]:
    """Whether each parameter that ``module`` itself shards requires gradients, be it gathered or not."""
    return [p.sharded_param.requires_grad for group in _param_groups(module) for p in group.fsdp_params]


def gather(module: FSDPModule) -> None:
    """Gather the parameters of ``module`` itself, unless they are, to require gradients as their shards do now."""
    module.unshard()
    for group in _param_groups(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_param.requires_grad_(parameter.sharded_param.requires_grad)


def expect_backward(root: FSDPModule, loss: Tensor) -> None:
    """Tell ``root`` that a backward from ``loss`` comes before its forward has returned."""
    root._get_fsdp_state()._register_pre_backward_hook(loss)


def reduce_unused_parameters(module: FSDPModule, enabled: bool) -> None:
    """Let parameters of ``module`` that got no gradient take part in the next reduction, as zeros (torch >= 2.13)."""
    if hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(enabled, recurse=False)


def forget_iteration(root: FSDPModule) -> None:
    """Drop gradient sums and pending communication of an iteration that will not be finished."""
    if root._get_fsdp_state()._is_root is None:  # no forward yet; resetting would fail on what is not there
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    for module in fsdp_modules(root):  # what `reset_iter_state` does since 2.13
        module.reshard()
        for group in _param_groups(module):
            group._partial_reduce_output = None


def fsdp_modules(root: nn.Module | FSDPModule) -> list[FSDPModule]:
    """Every module under ``root`` that FSDP2 shards, ``root`` included."""
    assert isinstance(root, nn.Module)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _param_groups(module: FSDPModule) -> Iterator[FSDPParamGroup]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # a list since 2.13, one or none before
    yield from groups if groups is not None else filter(None, [state._fsdp_param_group])
