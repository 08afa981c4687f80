"""Activation checkpointing: which modules are recomputed in backward, and how."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import compress
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mics.sharding.blocks import ModuleClasses, evenly, find_modules
from lightning_mics.sharding.modules.recomputed_buffers import RecomputedState

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # key-value caches in blocks of `transformers`


def find_recomputed(
    model: nn.Module, blocks: dict[str, nn.Module], activation_checkpointing: bool | float | ModuleClasses
) -> list[nn.Module]:
    """The modules that are recomputed in backward.

    Args:
        model: The model to search.
        blocks: Blocks of the model by fully qualified name, the last one first.
        activation_checkpointing: Whether to recompute all blocks; the share of the blocks to recompute, spread over the
            depth; or the modules to recompute: module classes, class names, or patterns of block names.

    Raises:
        TypeError: If ``activation_checkpointing`` holds anything but module classes, their names, and patterns.
        ValueError: If one of these classes is not in the model, no block's name matches a pattern, the share is not
            between 0 and 1, or it is "auto", which only a plan can choose.
    """
    if isinstance(activation_checkpointing, bool):
        return list(blocks.values()) if activation_checkpointing else []
    if isinstance(activation_checkpointing, int | float):
        return _spread(list(blocks.values())[::-1], activation_checkpointing)
    if activation_checkpointing == "auto":
        raise ValueError(
            'activation_checkpointing="auto" is for plans, which know how much memory activations take: run the '
            "recipes with it, or give the share of the blocks to recompute, between 0 and 1, or True"
        )
    entries = _listed(activation_checkpointing)
    patterns = [entry for entry in entries if isinstance(entry, str) and not entry.isidentifier()]
    classes = [entry for entry in entries if entry not in patterns]
    found = find_modules(model, classes, option="activation_checkpointing")
    for pattern in patterns:
        fitting = {name: block for name, block in blocks.items() if fnmatchcase(name, pattern)}
        if not fitting:
            names = list(reversed(blocks))
            raise ValueError(
                f"activation_checkpointing: no block fits the pattern {pattern!r}; the {len(names)} blocks are "
                f"{names[0]!r} to {names[-1]!r}"
            )
        found |= fitting
    return list(found.values())


def recompute_in_backward(modules: Iterable[nn.Module]) -> None:
    """Make each of ``modules`` save only its inputs in forward, and recompute the rest in backward."""
    for module in modules:
        module.forward = _recomputing(module.forward, RecomputedState(module))


def _spread(blocks: list[nn.Module], share: float) -> list[nn.Module]:
    """A share of ``blocks``, at equal distances; the last block is one of them."""
    if not 0 <= share <= 1:
        raise ValueError(f"activation_checkpointing={share} is not a share of the blocks, between 0 and 1")
    return list(compress(blocks, evenly(round(share * len(blocks)), len(blocks))))


def _listed(entries: ModuleClasses) -> list[type[nn.Module] | str]:
    return [entries] if isinstance(entries, str | type) else list(entries)


def _recomputing(forward: Callable[..., Any], state: RecomputedState) -> Callable[..., Any]:
    """``forward`` with activation checkpointing, called without key-value caches: recomputing would extend them."""
    names = inspect.signature(forward).parameters
    caches = {index for index, name in enumerate(names) if name in CACHES}

    # a function, not a partial: torch.compile leaves out everything that a partial of `checkpoint` calls
    def recomputed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(None if index in caches else value for index, value in enumerate(args))
        kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
        if torch.compiler.is_compiling() or not state.exists:  # a compiled backward has no second forward
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=state.contexts, **kwargs)

    return recomputed_forward
