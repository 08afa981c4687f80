"""Evaluation forwards in custom loops, where no hook announces them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def allow_evaluation(root: nn.Module) -> None:
    """Allow evaluation of ``root`` at any time, without gradients or in inference mode, between micro-steps too.

    FSDP2 leaves the root unsharded after a forward, for the backward that follows in training; after an evaluation it
    must be resharded, for an optimizer holds its sharded parameters. Tensors that FSDP2 allocates in
    ``torch.inference_mode`` could not be used in training, so the forward runs under ``torch.no_grad`` instead.

    See [Note: Hooks on the root, in order].

    Args:
        root: The sharded model.
    """
    assert isinstance(root, FSDPModule)
    modes: list[ExitStack] = []  # one per forward that is running: a forward may call itself

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
        if evaluated and not modes:  # an outer forward may still use the root's parameters
            module.reshard()  # type: ignore[operator]

    root.register_forward_pre_hook(enter, prepend=True)  # before FSDP2's own, which gathers
    root.register_forward_hook(leave, always_call=True)
