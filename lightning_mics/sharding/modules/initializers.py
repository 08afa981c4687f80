"""What sets the initial weights of modules on the meta device.

A module's ``reset_parameters``, then the ``_init_weights(module)`` of the nearest model around it, if the construction
of the model would call that: some models have one that their classes never call. A ``reset_parameters`` that a program
has put on a module itself is the program's last word: no ``_init_weights`` runs after it.

Layers with LoRA of ``peft`` set their adapters themselves, as in their construction: so that a model begins as its base
model does, which the adapters' linear layers by themselves would not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Initializer = Callable[[nn.Module], None]


def initialize(module: nn.Module, initializers: dict[nn.Module, Initializer]) -> None:
    """Set the tensors of ``module``, which has none on the meta device any more.

    Args:
        module: Module whose tensors have memory, and no values.
        initializers: Result of :func:`init_weights_of`.
    """
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, method, None)):
            reset()
    if module in initializers and "reset_parameters" not in vars(module):
        initializers[module](module)


def init_weights_of(model: nn.Module) -> dict[nn.Module, Initializer]:
    """For each module the ``_init_weights(module)`` of the nearest module around it, as in ``transformers``.

    None of these if no method of a class in ``model`` calls ``_init_weights``. A layer with adapters has its own.

    Args:
        model: The model.
    """
    found: dict[nn.Module, Initializer] = {}
    called = any(_calls_init_weights(kind) for kind in {type(module) for module in model.modules()})

    def visit(module: nn.Module, inherited: Initializer | None, adapters: Mapping[str, Any]) -> None:
        own = getattr(module, "_init_weights", None)
        nearest = own if called and _takes_one_module(own) else inherited
        adapters = getattr(module, "peft_config", None) or adapters
        if nearest is not None:
            found[module] = nearest
        if hasattr(module, "reset_lora_parameters") and adapters:
            found[module] = partial(_set_adapters, adapters)
        for child in module.children():
            visit(child, nearest, adapters)

    visit(model, None, {})
    return found


def _set_adapters(configs: Mapping[str, Any], layer: Any) -> None:
    """Set the adapters of a layer with LoRA, if they do not depend on its weights; those that do stay unset."""
    for adapter in (*layer.lora_A, *layer.lora_embedding_A):
        chosen = configs[adapter].init_lora_weights
        if chosen in (True, "gaussian"):
            layer.reset_lora_parameters(adapter, chosen)
        elif chosen is not False:
            raise TypeError(
                f"init_lora_weights={chosen!r} begins from the weights of the base model, which are on the meta device "
                "before it is sharded: build the base model off the meta device, or take init_lora_weights=True"
            )


def describe_initializers(model: nn.Module) -> str:
    """What will set the initial weights of ``model``, in a line; empty if no tensor is on the meta device.

    Args:
        model: The model, not sharded yet.
    """
    fresh = [m for m in model.modules() if any(p.is_meta for p in m.parameters(recurse=False))]
    if not fresh:
        return ""
    initializers = init_weights_of(model)
    run = {_name_of(initializers[m]) for m in fresh if m in initializers and "reset_parameters" not in vars(m)}
    own = sum("reset_parameters" in vars(module) for module in fresh)
    line = "reset_parameters() of each module"
    line += f", {own} of which have one of their own" if own else ""
    if run:
        return f"{line}; then {', '.join(sorted(run))}"
    unused = {type(m).__name__ for m in model.modules() if _takes_one_module(getattr(m, "_init_weights", None))}
    if unused and not initializers:
        line += f"; not _init_weights of {', '.join(sorted(unused))}, which its class does not call"
    return line


def _name_of(initializer: Initializer) -> str:
    owner = getattr(initializer, "__self__", None)
    return f"{type(owner).__name__}._init_weights" if owner is not None else "_init_weights"


def _calls_init_weights(kind: type) -> bool:
    return any(
        "_init_weights" in names
        for owner in kind.__mro__
        if owner not in (nn.Module, object)
        for name, method in vars(owner).items()
        if isinstance(method, FunctionType) and name != "_init_weights"
        for names in _names_in(method.__code__)
    )


def _names_in(code: CodeType) -> Iterator[tuple[str, ...]]:
    """The names that a function and the functions in it use."""
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _takes_one_module(method: object) -> bool:
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(object())
    except TypeError:
        return False
    return True
