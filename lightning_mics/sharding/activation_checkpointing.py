"""Activation checkpointing: which modules are recomputed in backward, and how."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import compress
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mics._torch.host_memory import USABLE_SHARE, SavedOnHost, host_memory_bytes
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


def recompute_in_backward(modules: Iterable[nn.Module], *, on_host: SavedOnHost | None = None) -> None:
    """Make each of ``modules`` save only its inputs in forward, and recompute the rest in backward.

    Args:
        modules: Modules to recompute.
        on_host: Where inputs wait for the backward; None leaves them on the device.
    """
    for module in modules:
        module.forward = _recomputing(module.forward, RecomputedState(module), on_host)


def inputs_on_host(recomputed: Sequence[nn.Module], *, processes: int = 1, taken_bytes: int = 0) -> SavedOnHost:
    """Where the inputs of recomputed modules wait for the backward, instead of on the device.

    Args:
        recomputed: Modules that are recomputed in backward.
        processes: Number of ranks that share the host's memory.
        taken_bytes: Host memory of this rank that caches and sums take.

    Raises:
        ValueError: If no module is recomputed.
    """
    if not recomputed:
        raise ValueError(
            "activation_offload=True moves the inputs of recomputed blocks to host memory, and no block is recomputed: "
            "set activation_checkpointing=True, or leave activation_offload out"
        )
    limit = int(USABLE_SHARE * host_memory_bytes()) // processes - taken_bytes
    beside = f", beside {taken_bytes / 2**30:.3g} GiB of caches and sums (cache_offload=True)," if taken_bytes else ""
    return SavedOnHost(limit_bytes=limit, what=f"activation_offload=True: the inputs of recomputed blocks{beside}")


def _spread(blocks: list[nn.Module], share: float) -> list[nn.Module]:
    """A share of ``blocks``, at equal distances; the last block is one of them."""
    if not 0 <= share <= 1:
        raise ValueError(f"activation_checkpointing={share} is not a share of the blocks, between 0 and 1")
    return list(compress(blocks, evenly(round(share * len(blocks)), len(blocks))))


def _listed(entries: ModuleClasses) -> list[type[nn.Module] | str]:
    return [entries] if isinstance(entries, str | type) else list(entries)


def _recomputing(
    forward: Callable[..., Any], state: RecomputedState, on_host: SavedOnHost | None
) -> Callable[..., Any]:
    """``forward`` with activation checkpointing, called without key-value caches: recomputing would extend them."""
    names = inspect.signature(forward).parameters
    caches = {index for index, name in enumerate(names) if name in CACHES}

    # a function, not a partial: torch.compile leaves out everything that a partial of `checkpoint` calls
    def recomputed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(None if index in caches else value for index, value in enumerate(args))
        kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
        if torch.compiler.is_compiling():  # a compiled backward has no second forward
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        contexts: dict[str, Any] = {"context_fn": state.contexts} if state.exists else {}
        if on_host is None:
            return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)
        values = (*args, *kwargs.values())  # `checkpoint` saves only what has a position
        with on_host.saving(values):
            return checkpoint(_by_position(forward, list(kwargs)), *values, use_reentrant=False, **contexts)

    vars(recomputed_forward)["__wrapped__"] = forward  # for copies of the module
    return recomputed_forward


def _by_position(forward: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """``forward``, taking the values of its keyword arguments after the positional ones.

    Args:
        forward: Forward of a module.
        names: Names of the keyword arguments.
    """

    def called(*values: Any) -> Any:
        positional = len(values) - len(names)
        return forward(*values[:positional], **dict(zip(names, values[positional:], strict=True)))

    return called
