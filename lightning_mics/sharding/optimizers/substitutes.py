"""Steps of an optimizer on plain tensors in place of its sharded parameters.

A hook before the step runs the optimizer's own ``step`` on substitutes of the parameters, with their gradients and
states, and copies the result into the shards; the step that torch then runs finds no parameters. So the optimizer
itself, its groups and options, learning rate schedulers and hooks of others stay what they are. Between steps, states
of the shape of a parameter are DTensors, as for any optimizer, so that checkpoints hold each row once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_mics._torch.dtensors.shards import with_local


class Substitution:
    """Hooks that replace the step of an optimizer.

    Args:
        optimizer: Optimizer whose step is replaced; it holds this object.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._held: list[list[nn.Parameter]] = []
        self._is_running = False
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Run the step of all parameters.

        Args:
            optimizer: The optimizer.
            step: The optimizer's own ``step``, for the parameters that its groups hold at that moment.
        """
        raise NotImplementedError

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_running or not _sharded_parameters(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._is_running = True
        try:
            self.step(optimizer, lambda: own_step(optimizer)(optimizer))
        finally:
            self._is_running = False
        self._held = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], *([] if closure is None else [lambda: loss])), rest

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        held, self._held = self._held, []
        for group, parameters in zip(optimizer.param_groups if held else (), held, strict=True):
            group["params"] = parameters


class StepOnShards(Substitution):
    """Steps on each rank's shards, of optimizers that treat each element by itself.

    Subclasses step on other tensors than the shards themselves: the four methods below say on which.
    """

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Run the step of all parameters at once, on local tensors.

        Args:
            optimizer: The optimizer.
            step: The optimizer's own ``step``, for the parameters that its groups hold at that moment.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        substitutes = self.substitutes(parameters)
        pairs = list(zip(parameters, substitutes, strict=True))
        local = dict(pairs)
        groups = [
            {**group, "params": [local[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
        ]
        states = {
            substitute: {name: self.value(value) for name, value in optimizer.state[parameter].items()}
            for parameter, substitute in pairs
            if parameter in optimizer.state
        }
        with _substituted(optimizer, groups, states) as after:
            self.run(step)
        self.finish(parameters, substitutes)
        for parameter, substitute in pairs:
            if substitute in after:
                optimizer.state[parameter] = {
                    name: _as_shard(value, parameter, substitute) for name, value in after[substitute].items()
                }

    def substitutes(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The tensors to step on, each with its gradient: [own].

        Args:
            parameters: Sharded parameters, each [any].
        """
        return [_local(parameter) for parameter in parameters]

    def value(self, value: Any) -> Any:
        """A value of a parameter's state as the step takes it.

        Args:
            value: Tensor, [any], or another value.
        """
        return _local_value(value)

    def run(self, step: Callable[[], Any]) -> None:
        """Run the optimizer's own step.

        Args:
            step: The step, for the substitutes.
        """
        step()

    def finish(self, parameters: list[nn.Parameter], substitutes: list[nn.Parameter]) -> None:
        """Bring new weights back; the substitutes here share the memory of the shards.

        Args:
            parameters: Sharded parameters, each [any].
            substitutes: The tensors that were stepped on.
        """


class StepOnWholeParameters(Substitution):
    """Steps on one unsharded parameter at a time, of optimizers that need all rows of it.

    Each parameter and its gradient are gathered over the partition group in every step; the memory of one of them, its
    gradient and its states is needed beyond the shards. All ranks compute the same update.
    """

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Run the step of one parameter after the other, and copy this rank's rows into its shard.

        Args:
            optimizer: The optimizer.
            step: The optimizer's own ``step``, for the parameters that its groups hold at that moment.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step_whole(optimizer, group, parameter, step)


def own_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The ``step`` of the optimizer's class, without the hooks that torch runs around it."""
    step = type(optimizer).step
    unhooked: Callable[..., Any] = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    return unhooked


def _step_whole(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, step: Callable[[], Any]) -> None:
    whole = nn.Parameter(_unsharded(parameter.detach()).clone(), requires_grad=parameter.requires_grad)
    assert parameter.grad is not None
    whole.grad = _unsharded(parameter.grad)
    alone = {**group, "params": [whole]}
    known = parameter in optimizer.state
    before = {whole: {name: _unsharded(value) for name, value in optimizer.state[parameter].items()}} if known else {}
    with _substituted(optimizer, [alone], before) as after:
        step()
    group.update((name, value) for name, value in alone.items() if name != "params")
    with torch.no_grad():
        parameter.copy_(_distributed(whole.detach(), like=parameter))
    if whole in after:
        optimizer.state[parameter] = {
            name: _distributed(value, like=parameter) if _is_of_shape(value, parameter) else value
            for name, value in after[whole].items()
        }


@contextmanager
def _substituted(
    optimizer: Optimizer, groups: list[dict[str, Any]], states: Mapping[Any, dict[str, Any]]
) -> Iterator[dict[Any, dict[str, Any]]]:
    """Give the optimizer other groups and states inside the context."""
    before = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, defaultdict(dict, dict(states))
    try:
        yield optimizer.state
    finally:
        optimizer.param_groups, optimizer.state = before


def _sharded_parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]


def _is_of_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and parameter.dim() > 0 and value.shape == parameter.shape


def _unsharded(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _distributed(whole: Tensor, *, like: Tensor) -> Tensor:
    """This rank's shard of ``whole`` [any], which all ranks have; without communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _local(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that shares the memory of this rank's shard, with the shard of the gradient."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = nn.Parameter(_local_value(parameter.detach()), requires_grad=parameter.requires_grad)
    local.grad = _local_value(parameter.grad)
    return local


def _local_value(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _as_shard(value: Any, parameter: Tensor, local: Tensor) -> Any:
    if isinstance(value, DTensor) or not (isinstance(parameter, DTensor) and _is_of_shape(value, local)):
        return value
    return with_local(value, like=parameter)
