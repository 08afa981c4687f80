"""LBFGS on sharded parameters: its vector of all parameters is a DTensor, so that dot products are those of the whole.

Each rank's part of the vector is the elements of its shards, filled up with zeros to the longest rank's, which change
neither dot products nor sums nor maxima. The loss decides how far the line search goes, so it is the mean over all
ranks: with the loss of one rank, ranks would take different numbers of steps.

The history of steps is kept here and not in the optimizer's state: a checkpoint stores states by parameter, and these
are vectors of this job's ranks. After a checkpoint is loaded the history begins anew, as after LBFGS's own restarts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.tensor import DTensor, Shard
from torch.optim import LBFGS, Optimizer

from lightning_mics._torch.dtensors.numbers import reduce_dot_products, whole_values


class StepOnOneVector:
    """Methods of one LBFGS, replaced so that its vectors are sharded.

    Args:
        optimizer: The optimizer; it holds this object.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, LBFGS)
        reduce_dot_products()
        warnings.warn(
            "LBFGS's history of steps is not saved in checkpoints of a sharded model: a resumed run begins a new one",
            stacklevel=2,
        )
        self._history: dict[Any, Any] = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        optimizer._params = optimizer.param_groups[0]["params"]
        if not any(isinstance(parameter, DTensor) for parameter in optimizer._params):
            return None
        vector = _Vector(optimizer._params)
        optimizer.state.update(self._history)
        vars(optimizer).update(_gather_flat_grad=vector.of_gradients, _add_grad=vector.add)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        return (args[0],), {"closure": _with_mean_loss(closure, _local(optimizer._params[0]).device)}

    def _after(self, optimizer: Any, *_: Any) -> None:
        self._history = dict(optimizer.state)
        optimizer.state.clear()


class _Vector:
    """All parameters as one vector: [longest rank's elements * ranks].

    Args:
        parameters: The sharded parameters, all on one mesh.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters
        first = next(parameter for parameter in parameters if isinstance(parameter, DTensor))
        mesh = first.device_mesh
        self._mesh = mesh if mesh.ndim == 1 else mesh["shard"]
        self._elements = sum(_local(parameter).numel() for parameter in parameters)
        longest = torch.tensor(self._elements, device=_local(first).device)
        self._longest = int(all_reduce(longest, "max", self._mesh.get_group()))

    def of_gradients(self) -> Tensor:
        """The gradients of all parameters, zero where there is none."""
        parts = [
            torch.zeros_like(_local(parameter)).view(-1)
            if parameter.grad is None
            else _local(parameter.grad).reshape(-1)
            for parameter in self._parameters
        ]
        flat = torch.cat([*parts, parts[0].new_zeros(self._longest - self._elements)])
        return DTensor.from_local(flat, self._mesh, [Shard(0)], run_check=False)

    def add(self, step_size: Any, update: Tensor) -> None:
        """Add a multiple of a vector to the parameters.

        Args:
            step_size: Factor, a number or a tensor of one element.
            update: Vector to add.
        """
        local, begin = _local(update), 0
        for parameter in self._parameters:
            shard = _local(parameter)
            shard.add_(local[begin : begin + shard.numel()].view_as(shard), alpha=float(step_size))
            begin += shard.numel()


def _with_mean_loss(closure: Callable[[], Any] | None, device: torch.device) -> Callable[[], Any]:
    """The closure with the mean loss over all ranks; torch initializes states by a step without one."""

    def evaluate() -> Any:
        loss = whole_values(closure()) if closure is not None else 0.0
        mean = torch.as_tensor(loss, device=device).detach().clone()
        world = dist.group.WORLD
        assert world is not None
        return all_reduce(mean, "sum", world) / world.size()

    return evaluate


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()
