"""Inputs of recomputed blocks on the host: the same training, bit for bit, with every schedule."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_mics._torch import host_memory
from lightning_mics.policy.policy import Policy
from lightning_mics.sharding.options import CommunicationOptions
from tests.support.models import TinyLM, tokens

LAYERS, MICRO_STEPS, STEPS = 3, 2, 2


WAYS = {
    "a node a group": {"partition_size": 2, **CommunicationOptions.PAPER.keywords()},
    "over nodes": {"partition_size": 4, **CommunicationOptions.PAPER.keywords()},
    "over nodes, once per step": {"partition_size": 4, **CommunicationOptions.NODE.keywords()},
    "once per step everywhere": {"partition_size": 4, **CommunicationOptions.RANK.keywords()},
    "half of the blocks": {"partition_size": 2, "activation_checkpointing": 0.67},
}


def trained(options: dict[str, Any], *, offload: bool) -> tuple[list[Tensor], int]:
    """Losses and local weights of a rank, and the number of inputs that went to the host."""
    torch.manual_seed(0)
    model = TinyLM(layers=LAYERS)
    policy = Policy(**{"ranks_per_node": 2, "activation_checkpointing": True, "activation_offload": offload, **options})
    schedule = policy.shard(model, precision="32-true", device=torch.device("cpu"), local_size=4).schedule
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Tensor] = []
    init, moved = host_memory._OnHost.__init__, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        moved.append(None)
        init(self, *args, **kwargs)

    with patch.object(host_memory._OnHost, "__init__", counted):
        for step in range(STEPS):
            for micro_step in range(MICRO_STEPS):
                with schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                    loss = model(tokens(3, seed=MICRO_STEPS * step + micro_step))
                    loss.backward()
                found.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                found.append(model(tokens(3, seed=99)))
    weights = [parameter.detach() for parameter in optimizer.param_groups[0]["params"]]
    return found + [getattr(each, "_local_tensor", each) for each in weights], len(moved)


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_weights_are_those_without_offloading(way: str, run_shared: Any) -> None:
    with_host, without = (run_shared(4, partial(trained, WAYS[way], offload=offload)) for offload in (True, False))
    blocks = 2 if "half" in way else LAYERS
    for (ours, moved), (theirs, unmoved) in zip(with_host, without, strict=True):
        assert (moved, unmoved) == (blocks * MICRO_STEPS * STEPS, 0)  # evaluation moves nothing
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
