"""The memory of sums is still there in the forward of the next step, beside the gradients of this one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import CommunicationOptions
from lightning_mics.planning.rehearsal.rehearse import CACHED, GRADIENTS, rehearse
from lightning_mics.topology import Topology

WIDTH, BLOCKS = 64, 4
WEIGHTS_BYTES = 4 * BLOCKS * WIDTH**2


def loss_with_a_large_forward(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that takes more memory in forward than everything else, and none in backward."""
    with torch.no_grad():
        torch.zeros(10 * WEIGHTS_BYTES)
    loss: Tensor = model(batch).square().mean()
    return loss


@pytest.mark.rehearsal
@pytest.mark.parametrize("micro_steps", [2, 3])
def test_sums_on_nodes_are_beside_gradients_of_the_step_before(micro_steps: int) -> None:
    peak = rehearse(
        lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))),
        torch.zeros(1, WIDTH),
        loss=loss_with_a_large_forward,
        topology=Topology(world_size=4, ranks_per_node=2, partition_size=4),
        micro_steps=micro_steps,
        communication=CommunicationOptions.NODE,
        block_classes={nn.Linear},
    ).peak
    assert peak[GRADIENTS] == WEIGHTS_BYTES / 4
    assert peak[CACHED] == 2 * WEIGHTS_BYTES / 2  # parameters and sums, each spread over the two ranks of a node
