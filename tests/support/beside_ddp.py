"""The same training under DDP and sharded, on the same ranks with the same samples, for comparisons."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model

OPTIONS = {  # partition size and communication
    "every": (2, CommunicationOptions.PAPER),
    "node": (4, CommunicationOptions.NODE),
    "rank": (2, CommunicationOptions.RANK),
    "alone": (1, CommunicationOptions.PAPER),
    "world": (4, CommunicationOptions.RANK),
}


def rank_inputs(step: int, *, samples: int = 4, dim: int = 4) -> Tensor:
    """This rank's samples of a micro-step: [samples, dim]."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(samples, dim, generator=generator)


def shard(model: nn.Module, mode: str = "every", **options: Any) -> Any:
    """Shard ``model`` on two ranks, or on four that count as two nodes; returns its schedule."""
    size, communication = OPTIONS[mode]
    topology = Topology(world_size=dist.get_world_size(), ranks_per_node=2, partition_size=size)
    groups = create_partition_groups(topology, device_type="cpu")
    return shard_model(model, groups, communication=communication, **options)


def train(
    make: Callable[[], nn.Module],
    mode: str,
    *,
    steps: int = 3,
    accumulate: int = 1,
    prepare: Callable[[nn.Module], Any] = lambda model: None,
    lr: float = 0.1,
    **options: Any,
) -> dict[str, Tensor]:
    """Train a model with SGD for a few steps.

    Args:
        make: Makes the model; its output is reduced to a loss by the mean of its squares.
        mode: ``"ddp"``, or a key of :data:`OPTIONS`.
        steps: Optimizer steps.
        accumulate: Micro-steps of each.
        prepare: Called with the model when it is sharded or wrapped.
        lr: Learning rate.
        options: Options of ``shard_model``.

    Returns:
        The tensors of the state dict, unsharded, and this rank's losses as ``"losses"``.
    """
    torch.manual_seed(0)
    model = make()
    schedule = None if mode == "ddp" else shard(model, mode, **options)
    wrapped = DistributedDataParallel(model) if mode == "ddp" else model
    prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for micro_step in range(steps * accumulate):
        boundary = (micro_step + 1) % accumulate == 0
        waiting = nullcontext() if boundary else wrapped.no_sync() if schedule is None else None
        with waiting or schedule.micro_step(boundary=boundary):
            loss = wrapped(rank_inputs(micro_step)).square().mean() / accumulate
            loss.backward()
        losses.append(loss.detach())
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
    return {**unsharded_state(model), "losses": torch.stack(losses)}


def unsharded_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict, unsharded, copied."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two results of :func:`train`."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())
