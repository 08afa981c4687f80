"""Manual optimization: a step may have several backwards, and each forward needs the root's parameters unsharded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_mics._torch.fsdp import unshard
from lightning_mics.sharding.blocks import group_modules


def unshard_whenever_used(root: Any, blocks: Collection[nn.Module]) -> None:
    """Unshard the root before each forward of a module in its parameter group.

    A step of manual optimization continues after a backward, which reshards the root, and after ``toggle_model``.
    The hooks are not on the root itself: see [Note: Hooks on the root, in order].

    Args:
        root: The root FSDP module.
        blocks: Blocks of the model, which are parameter groups of their own.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unshard_root(module: nn.Module, inputs: Any) -> None:
        unshard(root)

    for module in group_modules(root, set(blocks)):
        if module is not root:
            module.register_forward_pre_hook(unshard_root)
