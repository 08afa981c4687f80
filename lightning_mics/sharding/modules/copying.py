"""Copies of a sharded model by ``copy.deepcopy``: sharded too, with shards and hooks of their own.

FSDP2's hooks and parameter groups cannot be copied, and an unsharded model would not fit. So the modules are copied as
they were before the sharding, with parameters that have no values, sharded again over the same process groups, and
given copies of the shards::

    model        Block as FSDP2's class, shards, hooks of FSDP2 and of this package, hooks and attributes of the user
    modules      Block, parameters on the meta device,                               copied as `deepcopy` does
    copy         Block as FSDP2's class, copied shards, hooks of its own,            the user's

Nothing is communicated, and no tensor is whole. A copy takes the memory of the shards until its last reference is gone.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import fsdp_modules, is_in_iteration
from lightning_mics._torch.units.copies import (
    NAMES_OF_STATE,
    class_before_sharding,
    copy_shards,
    parameters_without_values,
)
from lightning_mics.sharding.accumulation_window import AccumulationWindow
from lightning_mics.sharding.modules.changes import write_changes

MAKERS = ("lightning_mics.", "torch.distributed.fsdp.")  # packages whose hooks are made anew for a copy

# attributes that sharding, and what it is used from, set on modules
SET = ("_copies", "_mics", "_unsharded_changes", "forward", "log", "save_pretrained", "zero_grad")

Prepare = Callable[[nn.Module], None]


class Copies:
    """Makes the copies of one sharded model.

    Args:
        root: The sharded model.
        mesh: Mesh of its parameters.
        window: Accumulation window of the model.
        shard: Shards a copy as the model is, without values.
    """

    def __init__(self, root: FSDPModule, mesh: DeviceMesh, window: AccumulationWindow, shard: Prepare) -> None:
        self._root = weakref.ref(root)
        self._mesh = mesh
        self._window = window
        self._shard = shard
        self._without: set[str] = set()
        self._prepare: list[Prepare] = []

    def prepare(self, function: Prepare, *, without: Iterable[str] = ()) -> None:
        """Call ``function(copy)`` for each copy, once it is sharded, and for each copy of it.

        Args:
            function: Prepares a copy as an integration has prepared the model.
            without: Attributes of the model that its copies get from ``function``.
        """
        self._prepare.append(function)
        self._without.update(without)

    def make(self, memo: dict[int, Any]) -> Any:
        """A copy of the model; every rank makes it, and no rank waits.

        Args:
            memo: Copies of other objects by ``id``, as ``copy.deepcopy`` passes it.

        Raises:
            RuntimeError: In an accumulation window, and in a forward or backward.
        """
        root: Any = self._root()
        kind = class_before_sharding(root).__name__
        if is_in_iteration(root):
            raise RuntimeError(f"{kind} is in a forward or backward, in which it cannot be copied: copy it between two")
        if self._window.is_open:
            raise RuntimeError(
                f"{kind} is in an accumulation window, whose gradients are pending on this model: copy it at a "
                "boundary, after the optimizer's step and before the next forward"
            )
        write_changes(root)
        for module in fsdp_modules(root).values():
            module.reshard()
        memo |= {id(self._mesh): self._mesh, **parameters_without_values(root)}
        with torch.inference_mode(False), torch.enable_grad():  # an evaluation may make it, and it may be trained
            made = self._copied(root, memo)
            self._shard(made)
            copy_shards(root, made)
            copies: Copies = vars(made)["_copies"]
            for function in self._prepare:
                function(made)
                copies.prepare(function, without=self._without)
        return made

    def _copied(self, root: nn.Module, memo: dict[int, Any]) -> Any:
        """The modules as they were before the sharding: those that copy themselves may do so."""
        own = [module for module in root.modules() if isinstance(module, FSDPModule) or not _copies_itself(module)]
        for module in own:
            kind = class_before_sharding(module)
            memo[id(module)] = kind.__new__(kind)
        for module in own:
            state = _own_state(module, self._without if module is root else ())
            made: Any = memo[id(module)]
            made.__setstate__(copy.deepcopy(state, memo))
        return memo[id(root)]


def allow_copies(root: FSDPModule, mesh: DeviceMesh, window: AccumulationWindow, shard: Prepare) -> None:
    """Let ``copy.deepcopy`` of ``root``, or of a module that holds it, copy it; a block alone cannot be copied.

    Args:
        root: The sharded model.
        mesh: Mesh of its parameters.
        window: Accumulation window of the model.
        shard: Shards a copy as the model is, without values.
    """
    vars(root)["_copies"] = Copies(root, mesh, window, shard)
    for module in fsdp_modules(root).values():
        type(module).__deepcopy__ = _copy  # type: ignore[attr-defined]
        if type(module).__reduce_ex__ is object.__reduce_ex__:
            type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign,assignment]


def prepare_copies(root: nn.Module, function: Prepare, *, without: Iterable[str] = ()) -> None:
    """Call ``function(copy)`` for each copy of ``root``, as :meth:`Copies.prepare` does.

    Args:
        root: The sharded model.
        function: Prepares a copy as an integration has prepared the model.
        without: Attributes of the model that its copies get from ``function``.
    """
    vars(root)["_copies"].prepare(function, without=without)


def reject_copy(module: nn.Module) -> None:
    """Check that ``module`` is no copy of a sharded model, which an integration cannot set up again.

    Raises:
        TypeError: If it is one.
    """
    if "_copies" in vars(module):
        raise TypeError(
            f"this {class_before_sharding(module).__name__} is a copy of a sharded model, for forwards, and is sharded "
            "already: to train it, set up a second model and load it with `load_state_dict(model.state_dict())`"
        )


def _copy(module: nn.Module, memo: dict[int, Any]) -> Any:
    copies: Copies | None = vars(module).get("_copies")
    return _reject(module) if copies is None else copies.make(memo)


def _reject(module: nn.Module) -> NoReturn:
    raise TypeError(
        f"{class_before_sharding(module).__name__} is a block of a sharded model, whose process groups and schedule a "
        "part cannot have for itself: copy the whole model, or make the copy before it is sharded, in `__init__` or "
        "before `setup` or `prepare`, so that the copy is sharded too"
    )


def _reduce(module: nn.Module, protocol: Any) -> Any:
    if sys._getframe(1).f_globals.get("__name__") in ("copy", __name__):
        return object.__reduce_ex__(module, protocol)
    raise TypeError(
        f"{class_before_sharding(module).__name__} is sharded, and cannot be pickled: its shards, hooks and process "
        "groups are this rank's. Copy it with `copy.deepcopy(model)`; for its weights, call `state = "
        "lightning_mics.full_state_dict(model)` on every rank and save that on rank 0; or save a checkpoint, with "
        "`trainer.save_checkpoint`, `fabric.save` or `accelerator.save_state`"
    )


def _copies_itself(module: nn.Module) -> bool:
    return hasattr(type(module), "__deepcopy__")


def _own_state(module: nn.Module, without: Iterable[str]) -> dict[str, Any]:
    """What ``copy.deepcopy`` would copy of ``module``, without what sharding has set and registered."""
    state: dict[str, Any] = dict(module.__reduce_ex__(4)[2])  # type: ignore[arg-type]
    for name in (*NAMES_OF_STATE, *without):
        state.pop(name, None)
    for name in [name for name in SET if name in state and _is_made_for_one(state[name])]:
        before = getattr(state.pop(name), "__wrapped__", None)
        if before is not None and not _is_method(before, module, name):
            state[name] = before
    gone = {
        key
        for name, hooks in state.items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for key, hook in hooks.items()
        if _is_made_for_one(hook)
    }
    for name, hooks in state.items():
        if "_hooks" in name and isinstance(hooks, dict):
            state[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in gone)
    return state


def _is_method(function: Any, module: nn.Module, name: str) -> bool:
    """Whether ``function`` is what ``module.name`` is without an attribute of the module's own."""
    return isinstance(function, MethodType) and function.__func__ is getattr(type(module), name, None)


def _is_made_for_one(value: Any) -> bool:
    """Whether a hook or attribute was made by FSDP2 or this package, for the one model that it is on."""
    value = getattr(value, "hook", value)  # torch wraps hooks on state dicts
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__func__
    maker = getattr(value, "__module__", None) if callable(value) else None
    return (maker or type(value).__module__).startswith(MAKERS)
