"""The kinds of tensors that an optimizer keeps, found by a step of a copy of it on zeros.

The optimizer itself, its parameters and the random numbers of the job are not touched. Where the copy cannot step, for
instance because it needs a closure, nothing is known.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics._torch.accelerator import device_in_use
from lightning_mics.checkpoint.content.placing import local_part


def state_after_a_trial_step(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """The state that a first step makes, by name and slot: zeros and counters. Every rank calls it.

    Args:
        optimizer: The optimizer.
        groups: Options of its groups, with the names of their parameters.
        parameters: Some of its parameters by name, sharded.

    Returns:
        State by name; empty if such an optimizer cannot step by itself.
    """
    trial: Any = object.__new__(type(optimizer))
    vars(trial).update({name: value for name, value in vars(optimizer).items() if name != "step"})
    for name, hooks in vars(optimizer).items():
        if isinstance(hooks, OrderedDict) and name.endswith("_hooks"):
            vars(trial)[name] = OrderedDict()
    stand_ins = {name: _zeros(parameter) for name, parameter in parameters.items()}
    trial.state = defaultdict(dict)
    trial.param_groups = [
        {**copy.deepcopy(dict(group)), "params": [stand_ins[name] for name in group["params"] if name in stand_ins]}
        for group in groups
    ]
    trial.param_groups = [group for group in trial.param_groups if group["params"]]
    step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)  # without torch's hooks
    device = device_in_use()
    devices = [] if device is None else [device]
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            step(trial)
    except Exception:  # an optimizer may raise anything
        return {}
    return {name: dict(trial.state[stand_in]) for name, stand_in in stand_ins.items()}


def trained_bytes(model: nn.Module, optimizers: Sequence[Optimizer]) -> int | None:
    """Bytes of this rank's parameters and of the states that their optimizers will keep. Every rank calls it.

    Args:
        model: The sharded model.
        optimizers: The model's optimizers.

    Returns:
        The bytes, without counters and what else is not of a parameter's shape; None if an optimizer cannot be tried.
    """
    count = sum(local_part(parameter).nbytes for parameter in model.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not group["params"]:
                continue
            smallest = min(group["params"], key=torch.numel)
            tried = state_after_a_trial_step(optimizer, [{**group, "params": ["one"]}], {"one": smallest})
            if not tried:
                return None
            kept = [v for v in tried["one"].values() if isinstance(v, Tensor) and v.shape == smallest.shape]
            of_value = sum(tensor.element_size() for tensor in kept)
            count += of_value * sum(local_part(parameter).numel() for parameter in group["params"])
    return count


def _zeros(parameter: nn.Parameter) -> nn.Parameter:
    zeros = nn.Parameter(torch.zeros_like(parameter))
    zeros.grad = torch.zeros_like(parameter)
    return zeros
