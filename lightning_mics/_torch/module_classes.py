"""The classes that ``fully_shard`` gives to modules: named as the user's, and possible for more classes.

torch makes a class ``FSDPBlock`` of ``FSDPModule`` and ``Block``, and looks classes up that it has made before. Here
they are made first, with the name of the original. Where a base with ``__slots__ = ()`` comes first, as ``Generic`` and
``ABC`` are, Python cannot assign torch's class to a module, as it extends ``object`` in another way; a class without
content, which extends that base in the same way, makes it possible.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fully_shard import _unimplemented_deepcopy, cls_to_fsdp_cls

from lightning_mics._torch.parameter_hooks import keeping_attributes


def prepare_class(module: nn.Module) -> None:
    """Make the class that ``fully_shard`` will give to ``module``.

    Raises:
        TypeError: If Python cannot assign such a class to the module.
    """
    original: Any = type(module)
    if original in cls_to_fsdp_cls:
        return
    made = _made(original, FSDPModule, original)
    if not _can_become(module, made):
        made = _made(original, _same_layout(original), FSDPModule, original)
    if not _can_become(module, made):
        raise TypeError(
            f"{original.__name__} cannot be sharded: Python does not let a module of a class with these bases and "
            "`__slots__` change its class; name the bases with slots after nn.Module or LightningModule"
        )
    cls_to_fsdp_cls[original] = made


def _apply(module: Any, *args: Any, **kwargs: Any) -> Any:
    module.reshard()
    with keeping_attributes(module):
        return FSDPModule._apply(module, *args, **kwargs)


def _made(original: type, *bases: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    position = {"_orig_cls_mro_index": len(bases)}  # of the original, after the new class and the other bases
    methods = {"__deepcopy__": _unimplemented_deepcopy, "_apply": _apply}
    made: type = type(original.__name__, bases, {**methods, **names, **position})
    return made


def _can_become(module: nn.Module, kind: type) -> bool:
    original = type(module)
    try:
        module.__class__ = kind
    except TypeError:
        return False
    module.__class__ = original
    return True


def _same_layout(kind: type) -> type:
    """A class without content that adds to its base what ``kind``, or the first of its bases that adds any, adds."""
    while _layout(kind) == _layout(kind.__base__):
        assert kind.__base__ is not None
        kind = kind.__base__
    assert kind.__base__ is not None
    return types.new_class("_Layout", (kind.__base__,), exec_body=lambda namespace: namespace.update(__orig_bases__=()))


def _layout(kind: Any) -> tuple[int, ...]:
    return kind.__basicsize__, kind.__dictoffset__, kind.__weakrefoffset__, kind.__itemsize__
