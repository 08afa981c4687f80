"""A small model under Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from lightning_mics import CommunicationOptions
from lightning_mics.integrations.accelerate import MiCSPlugin
from tests.support.loops import network, sgd
from tests.support.models import tokens


def start(*, plugin: dict[str, Any] | None = None, **options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    communication = CommunicationOptions.NODE.keywords()
    policy = {"ranks_per_node": 2, "partition_size": 2, **communication, **(plugin or {})}
    return Accelerator(**{"cpu": True, "fsdp_plugin": MiCSPlugin(**policy), **options})


def prepared(accelerator: Accelerator, make_optimizer: Callable[[nn.Module], Any] = sgd, seed: int = 1) -> Any:
    model = network(seed)
    return accelerator.prepare(model, make_optimizer(model))


def plugin_of(accelerator: Accelerator) -> MiCSPlugin:
    return accelerator.state.fsdp_plugin


def step(accelerator: Accelerator, model: Any, optimizer: Any, *, seed: int = 0) -> None:
    accelerator.backward(model(tokens(2, seed=10 * seed + accelerator.process_index)))
    optimizer.step()
    optimizer.zero_grad()
