"""What users have put on parameters: gradient hooks and attributes, carried over to the parameters that FSDP2 makes.

``fully_shard`` makes a sharded parameter of each original one, and the first all-gather an unsharded one, the leaf that
autograd sees. Both show what the original one had::

    on the original parameter                  where it acts
    register_hook                              on the unsharded parameter: a rank's own, unsharded gradient, as in DDP
    register_post_accumulate_grad_hook         on the sharded parameter: the reduced gradient, once per boundary
    attributes                                 on both

    class                                      on both, for ``isinstance``

The parameters share one dictionary of hooks, the original's, so that handles stay valid. Hooks that are registered
later, on either parameter, are shared at the next forward or backward of the module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import _get_grad_fn_or_grad_acc
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics._torch.fsdp import _param_groups


@contextmanager
def carrying_over(module: nn.Module) -> Iterator[None]:
    """Give parameters of ``module`` that are sharded inside the hooks and attributes of the original ones."""
    before = {
        (owner, name): parameter
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if not isinstance(parameter, DTensor)
    }
    attributes = {parameter: dict(vars(parameter)) for parameter in before.values()}
    yield
    for (owner, name), parameter in before.items():
        carry_over(parameter, owner._parameters[name], attributes=attributes[parameter])


@contextmanager
def keeping_attributes(module: nn.Module) -> Iterator[None]:
    """Keep attributes of sharded parameters that ``module.to()`` and the like exchange for others inside."""
    before = [
        (owner, name, dict(vars(parameter)))
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]
    yield
    for owner, name, attributes in before:
        now = vars(owner._parameters[name])
        now.update({key: value for key, value in attributes.items() if key not in now})


def carry_over(source: Tensor, target: Any, *, attributes: dict[str, Any] | None = None) -> None:
    """Give ``target`` the hooks and attributes of ``source``.

    Args:
        source: Parameter or buffer, [any].
        target: Tensor that takes its place, [any].
        attributes: Attributes of the source; None takes the present ones.
    """
    if source is target:
        return
    vars(target).update(vars(source) if attributes is None else attributes)
    if isinstance(source, nn.Parameter) and type(source) is not nn.Parameter:
        vars(target).setdefault(_CLASS, type(source))
        _show_original_classes()
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if (hooks := getattr(source, kind)) is not None:
            setattr(target, kind, hooks)


_CLASS = "_class_before_sharding"  # attribute of parameters whose class was one of the user's


def _show_original_classes() -> None:
    """Let ``isinstance`` of a class of parameters be true for sharded parameters that were of that class."""
    meta: Any = type(nn.Parameter)
    check = meta.__instancecheck__
    if hasattr(check, "__wrapped__"):
        return

    @wraps(check)
    def check_both(kind: type, instance: Any) -> bool:
        return check(kind, instance) or (isinstance(instance, Tensor) and issubclass(_class_before(instance), kind))

    meta.__instancecheck__ = check_both


def _class_before(tensor: Tensor) -> type:
    kind: type = vars(tensor).get(_CLASS, object)
    return kind


class ParameterHooks:
    """The hooks on the parameters of one module itself, shared by its sharded and unsharded parameters.

    Parameters without elements get no gradients, which FSDP2 could not reduce.

    Args:
        module: FSDP module.
        at_boundary: Returns whether the backward that runs is a gradient accumulation boundary.
    """

    def __init__(self, module: FSDPModule, *, at_boundary: Callable[[], bool]) -> None:
        groups: list[Any] = list(_param_groups(module))
        self._parameters: list[Any] = [p for group in groups for p in group.fsdp_params]
        for group in groups:
            group.pre_backward = partial(self._pre_backward, group)
        self.at_boundary = at_boundary
        self._empty = [p for p in self._parameters if p.sharded_param.numel() == 0]
        self._with_attributes = False

    def share(self) -> None:
        """Share the hooks that users have registered since the last call; does nothing before the first all-gather."""
        for parameter in self._parameters:
            sharded, unsharded = parameter.sharded_param, getattr(parameter, "_unsharded_param", None)
            if unsharded is None:
                return
            hooks = sharded._backward_hooks
            if hooks is not unsharded._backward_hooks:
                hooks = _share(sharded, unsharded, "_backward_hooks")
            if hooks:
                _wait_for_unsharded(hooks, unsharded)
            hooks = sharded._post_accumulate_grad_hooks
            if hooks is not unsharded._post_accumulate_grad_hooks:
                hooks = _share(sharded, unsharded, "_post_accumulate_grad_hooks")
            if hooks:
                self._run_once_per_gradient(hooks)
        for parameter in self._empty:
            parameter._unsharded_param.requires_grad_(False)
        if not self._with_attributes:
            self._with_attributes = True
            for parameter in self._parameters:
                _copy_attributes(parameter.sharded_param, parameter._unsharded_param)

    def _pre_backward(self, group: Any, *args: Any) -> None:
        type(group).pre_backward(group, *args)
        self.share()

    def _run_once_per_gradient(self, hooks: dict[int, Any]) -> None:
        for key, hook in hooks.items():
            if not isinstance(hook, _OncePerGradient):
                hooks[key] = _OncePerGradient(hook, weakref.ref(self))


class _OncePerGradient:
    """A hook that runs after the reduced gradient has been accumulated.

    FSDP2 runs hooks of sharded parameters after each of its reductions, autograd those of unsharded ones before them.
    Before the boundary FSDP2 may add zeros: see [Note: Zero gradients before the boundary].

    Args:
        hook: The user's hook.
        module: The hooks of its module; weak, as Python never collects what hooks of this kind refer to.
    """

    def __init__(self, hook: Callable[[Any], None], module: weakref.ref[ParameterHooks]) -> None:
        self._hook = hook
        self._module = module

    def __call__(self, parameter: Tensor) -> None:
        module = self._module()
        if isinstance(parameter, DTensor) and module is not None and module.at_boundary():
            self._hook(parameter)


def users_hook(hook: Any) -> Any:
    """The hook that was registered, of one that runs in its place."""
    return hook._hook if isinstance(hook, _OncePerGradient) else hook


def _wait_for_unsharded(hooks: dict[int, Any], unsharded: Tensor) -> None:
    """Let hooks of ``register_multi_grad_hook`` wait for the gradients of unsharded parameters, the leaves."""
    for hook in hooks.values():
        if getattr(hook, "__qualname__", "").startswith("register_multi_grad_hook.<locals>.get_inner_hook"):
            variables = {
                name: cell.cell_contents for name, cell in zip(hook.__code__.co_freevars, hook.__closure__, strict=True)
            }
            variables["grad_fns"][variables["idx"]] = _get_grad_fn_or_grad_acc(unsharded)


def _share(sharded: Any, unsharded: Any, kind: str) -> Any:
    """Let both parameters have one dictionary of hooks of this ``kind``; the sharded one's if both have one."""
    own, other = getattr(sharded, kind), getattr(unsharded, kind)
    if own is None:
        setattr(sharded, kind, other)
        return other
    if other is not None:
        own.update(other)
    setattr(unsharded, kind, own)
    return own


def _copy_attributes(sharded: Any, unsharded: Any) -> None:
    for name, value in vars(sharded).items():
        vars(unsharded).setdefault(name, value)
