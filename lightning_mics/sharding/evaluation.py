"""Forwards that no backward follows, in loops that tell nobody of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def allow_evaluation(root: nn.Module) -> None:
    """Let ``root`` run without gradients wherever its users like, and be trained afterwards.

    FSDP2 leaves the root gathered after a forward, for a backward that an evaluation does not have: until then its
    parameters are not the ones that optimizers know. And what it allocates in ``torch.inference_mode`` could not be
    trained with; the forward runs under ``torch.no_grad`` instead.

    Args:
        root: The sharded model.
    """
    assert isinstance(root, FSDPModule)
    modes: list[ExitStack] = []  # of forwards that run now: a forward may call itself

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(_module: nn.Module, _inputs: Any) -> None:
        modes.append(ExitStack())
        if torch.is_inference_mode_enabled():
            modes[-1].enter_context(torch.inference_mode(False))
            modes[-1].enter_context(torch.no_grad())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        evaluated = not torch.is_grad_enabled()
        if modes:
            modes.pop().close()
        if evaluated and not modes:  # a forward around it may need the root still
            module.reshard()  # type: ignore[operator]

    root.register_forward_pre_hook(enter, prepend=True)  # before FSDP2's own, which gathers
    root.register_forward_hook(leave, always_call=True)
