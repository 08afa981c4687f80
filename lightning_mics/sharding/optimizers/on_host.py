"""Steps of an optimizer in host memory, where its states stay; weights and gradients stay on the device.

::

    device      weight, gradient -- copied -->                   <-- copied -- weight
    host                                      weight, gradient, states: step

Optimizers of torch that treat each element by itself step on ordinary tensors. Others step on DTensors on the host, so
that a norm of theirs is that of the whole parameter. States are made on the host by the first step. Those of a
checkpoint come by the device, where torch puts loaded states, and move when they are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics._torch.dtensors.owned_rows import elements_here
from lightning_mics._torch.dtensors.shards import with_local
from lightning_mics._torch.host_memory import on_host
from lightning_mics._torch.streams import current_stream, has_streams
from lightning_mics.sharding.optimizers.substitutes import StepOnShards

CPU = torch.device("cpu")


class StepOnHost(StepOnShards):
    """Steps on copies of each rank's shards in host memory.

    Args:
        optimizer: Optimizer whose step is replaced; it holds this object.
        element_by_element: Whether it treats each element by itself.
    """

    def __init__(self, optimizer: Optimizer, *, element_by_element: bool) -> None:
        super().__init__(optimizer)
        self._element_by_element = element_by_element
        optimizer.register_load_state_dict_post_hook(_move_states)

    @override
    def substitutes(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        with on_host():
            copies = [self._copy(parameter) for parameter in parameters]
        for device in {elements_here(parameter).device for parameter in parameters}:
            if has_streams(device):
                current_stream(device).synchronize()  # the step reads what is being copied
        return copies

    @override
    def value(self, value: Any) -> Any:
        value = on_cpu(value)
        return super().value(value) if self._element_by_element else value

    @override
    def run(self, step: Any) -> None:
        with on_host():
            step()

    @override
    @torch.no_grad()
    def finish(self, parameters: list[nn.Parameter], substitutes: list[nn.Parameter]) -> None:
        for parameter, copy in zip(parameters, substitutes, strict=True):
            elements_here(parameter).copy_(elements_here(copy), non_blocking=True)

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(self._copied(parameter.detach()), requires_grad=parameter.requires_grad)
        copy.grad = None if parameter.grad is None else self._copied(parameter.grad)
        return copy

    def _copied(self, tensor: Tensor) -> Tensor:
        local = elements_here(tensor)
        copy = torch.empty_like(local, device=CPU, pin_memory=has_streams(local.device))
        copy.copy_(local, non_blocking=True)
        return copy if self._element_by_element or not isinstance(tensor, DTensor) else with_local(copy, like=tensor)


def on_cpu(value: Any) -> Any:
    """A state of an optimizer with its values in host memory; those that are there already are not copied.

    Args:
        value: Tensor, [any], or another value, which is returned unchanged.
    """
    if isinstance(value, DTensor):
        local = value.to_local()
        return value if local.device == CPU else with_local(local.to(CPU), like=value)
    return value.to(CPU) if isinstance(value, Tensor) else value


def _move_states(optimizer: Optimizer) -> None:
    for slots in optimizer.state.values():
        slots.update((name, on_cpu(value)) for name, value in slots.items())
