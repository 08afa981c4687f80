"""Ranks that use different blocks under ``allow_unused=True`` train as DistributedDataParallel trains them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mics import CommunicationOptions, RanksDifferError, Topology, create_partition_groups, shard_model
from tests.support.campaign import campaign
from tests.support.models import Block

DIM, LAYERS = 6, 4

# blocks that a rank runs in a micro-step
WAYS: dict[str, Any] = {
    "experts by rank": lambda rank, step: [rank],
    "layer drop": lambda rank, step: [layer for layer in range(3) if (layer + rank + step) % 3],
    "early exit": lambda rank, step: range((rank + step) % 3),
    "orders": lambda rank, step: [(layer + rank) % 3 for layer in range(3)],
    "the same twice on some": lambda rank, step: [0, 1, 0] if rank % 2 else [0, 1],
}

SHARDINGS = [
    (1, "never", "shard"),
    (2, "never", "shard"),
    (4, "never", "shard"),
    (4, "node", "node"),
    (4, "rank", "rank"),
    (2, "rank", "rank"),
]


class Switched(nn.Module):
    """Blocks of which a forward runs some; the fourth is for rank 3, or for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, DIM)
        self.blocks = nn.ModuleList(Block(DIM) for _ in range(LAYERS))
        self.last = nn.Linear(DIM, 2)

    def forward(self, x: Tensor, way: Any) -> Tensor:  # [batch, 3] -> []
        hidden = self.first(x)
        for index in way:
            hidden = self.blocks[index](hidden)
        return self.last(hidden).square().mean()


def _train(model: Any, micro_step: Any, name: str, micro_steps: int) -> tuple[dict[str, Tensor], list[str]]:
    """Weights after two optimizer steps, whole, and the parameters without a gradient before the last."""
    rank, without = dist.get_rank(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    draw = torch.Generator().manual_seed(rank)
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(micro_steps):
            with micro_step(micro == micro_steps - 1):
                model(torch.randn(2, 3, generator=draw), WAYS[name](rank, step + micro)).backward()
        without = [key.removeprefix("module.") for key, p in model.named_parameters() if p.grad is None]
        optimizer.step()
    weights = {key.removeprefix("module."): value.detach() for key, value in model.named_parameters()}
    return {key: w.full_tensor() if isinstance(w, DTensor) else w for key, w in weights.items()}, without


def _both(name: str, micro_steps: int, shardings: list[Any]) -> list[Any]:
    """The gap to DistributedDataParallel in each sharding, and what has no gradient in both."""
    torch.manual_seed(0)
    network = Switched()
    peer = DistributedDataParallel(deepcopy(network), find_unused_parameters=True)

    def sync(boundary: bool) -> Any:
        return torch.enable_grad() if boundary else peer.no_sync()

    expected, without = _train(peer, sync, name, micro_steps)
    found = []
    for size, cache, accumulate in shardings:
        model = deepcopy(network)
        groups = create_partition_groups(
            Topology(world_size=4, ranks_per_node=2, partition_size=size), device_type="cpu"
        )
        options = CommunicationOptions(cache_parameters=cache, accumulate_gradients=accumulate, allow_unused=True)
        schedule = shard_model(model, groups, communication=options)
        ours, ours_without = _train(
            model, lambda boundary, by=schedule: by.micro_step(boundary=boundary), name, micro_steps
        )
        gap = max(float((ours[key] - expected[key]).abs().max()) for key in expected)
        found.append((gap, ours_without == without, len(without)))
    return found


ONE, OTHER = SHARDINGS[::2], SHARDINGS[1::2]

CASES = [
    ("experts by rank", 1, SHARDINGS),
    ("early exit", 2, ONE),
    ("the same twice on some", 2, OTHER),
    campaign("early exit", 2, OTHER),
    campaign("the same twice on some", 2, ONE),
    campaign("orders", 1, SHARDINGS),
    campaign("layer drop", 2, SHARDINGS),
]


@pytest.mark.parametrize(("name", "micro_steps", "shardings"), CASES)
def test_ranks_that_use_different_blocks_train_as_under_ddp(name, micro_steps, shardings, run_shared):
    for of_rank in run_shared(4, _both, name, micro_steps, shardings):
        for (gap, same_without, _), sharding in zip(of_rank, shardings, strict=True):
            assert gap < 2e-6, sharding
            assert same_without, sharding
    unused = of_rank[0][2]
    assert (unused > 0) == (name != "experts by rank")  # so that None is not only never there


def _without_option() -> str:
    model = Switched()
    groups = create_partition_groups(Topology(world_size=4, ranks_per_node=2, partition_size=2), device_type="cpu")
    schedule = shard_model(model, groups)
    with pytest.raises(RanksDifferError) as caught, schedule.micro_step(boundary=True):
        model(torch.ones(2, 3), WAYS["orders"](dist.get_rank() % 2, 0)).backward()
    return str(caught.value)


def test_without_the_option_the_error_names_it(run_shared):
    for message in run_shared(4, _without_option):
        assert "pass allow_unused=True" in message
        assert "'blocks.0'" in message
        assert "'blocks.1'" in message


def test_it_is_true_or_false():
    with pytest.raises(ValueError, match="allow_unused=1 is neither True nor False"):
        CommunicationOptions(allow_unused=1)
