"""Manual optimization: several backwards in one step, whose forwards need the root's parameters unsharded each time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_mics._torch.fsdp import unshard
from lightning_mics.sharding.blocks import group_modules


def unshard_whenever_used(root: Any, blocks: Collection[nn.Module]) -> None:
    """Unshard the root before each module of it that runs.

    A step of manual optimization continues after a backward, which reshards the root, and after ``toggle_model``.
    The hooks are on the blocks, after those that blocks share with the root: see [Note: Hooks on the root, in order].

    Args:
        root: The root FSDP module.
        blocks: The blocks of it that are sharded one by one.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unshard_root(module: nn.Module, inputs: Any) -> None:
        unshard(root)

    for module in group_modules(root, set(blocks)):
        if module is not root:
            module.register_forward_pre_hook(unshard_root)
