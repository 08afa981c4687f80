"""Copies of a sharded module: the classes and parameters from before the sharding, and shards of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import _param_groups, fsdp_modules

NAMES_OF_STATE = (STATE_KEY, REGISTRY_KEY)  # attributes of a module that `fully_shard` has been applied to


def class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as its author wrote it.

    Args:
        module: A module, sharded or not.
    """
    kind: Any = type(module)
    return kind.__mro__[kind._orig_cls_mro_index] if isinstance(module, FSDPModule) else kind  # type: ignore[no-any-return]


def parameters_without_values(root: FSDPModule) -> dict[int, nn.Parameter]:
    """Unsharded parameters on the meta device for those of a sharded model, which must not be unsharded.

    Args:
        root: The sharded model.

    Returns:
        A parameter, [any], by the ``id`` of the sharded one, and of the unsharded one that FSDP2 shows in a forward.
    """
    found = {}
    for module in fsdp_modules(root).values():
        for group in _param_groups(module):
            for parameter in group.fsdp_params:
                shard = parameter.sharded_param
                empty = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
                found[id(shard)] = made = nn.Parameter(empty, requires_grad=shard.requires_grad)
                if hasattr(parameter, "_unsharded_param"):
                    found[id(parameter._unsharded_param)] = made
    return found


@torch.no_grad()
def copy_shards(source: FSDPModule, target: FSDPModule) -> None:
    """Give ``target``, which was sharded without values, copies of the shards of ``source``; does not communicate.

    Args:
        source: A sharded model.
        target: A model of the same modules, sharded over the same mesh.
    """
    modules = zip(fsdp_modules(source).values(), fsdp_modules(target).values(), strict=True)
    for group, empty in ((g, e) for pair in modules for g, e in zip(*map(_param_groups, pair), strict=True)):
        for parameter, of_copy in zip(group.fsdp_params, empty.fsdp_params, strict=True):
            shard = nn.Parameter(parameter.sharded_param.detach().clone(), parameter.sharded_param.requires_grad)
            vars(shard).update(vars(parameter.sharded_param))
            of_copy._setattr_on_modules(shard)
            of_copy.reset_sharded_param()
