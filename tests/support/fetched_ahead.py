"""Training of a small network with units fetched ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.techniques.inter_node_prefetch import UnitPrefetch

WIDTHS = (16, 8, 24, 8)  # of blocks
TWO_BY_TWO = Topology(world_size=4, ranks_per_node=2, partition_size=4)


class Network(nn.Module):
    """Blocks of different sizes between two layers of the root; some may be left out, or run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, w), nn.Tanh(), nn.Linear(w, 4)) for w in WIDTHS)
        self.last = nn.Linear(4, 4)
        self.used = list(range(len(WIDTHS)))

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        x = self.first(x)
        for index in self.used:
            x = x + self.blocks[index](x)
        return self.last(x)


@cache
def groups_of(topology: Topology, hierarchical: Any) -> Any:
    """Process groups that all jobs of a fork of ranks share."""
    return create_partition_groups(topology, device_type="cpu", hierarchical=hierarchical)


class Job:
    """A sharded network on this rank, and what it has computed."""

    def __init__(self, options: CommunicationOptions, topology: Topology = TWO_BY_TWO, **sharding: Any) -> None:
        torch.manual_seed(0)
        groups = groups_of(topology, options.hierarchical)
        self.model: Any = Network()
        self.options = options
        self.schedule = shard_model(self.model, groups, communication=options, **sharding)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.losses: list[Tensor] = []
        self.collectives: Counter[str] = Counter()
        self._count_collectives(self.schedule.traffic)

    def _count_collectives(self, traffic: Any) -> None:
        record = traffic.record

        def counted(technique: str, sent: Any) -> None:
            self.collectives[technique] += 1
            record(technique, sent)

        traffic.record = counted

    def loss(self) -> Tensor:
        value: Tensor = self.model(samples_of(len(self.losses), dist.get_rank())).square().mean()
        self.losses.append(value.detach())
        return value

    def window(self, micro_steps: int = 2, between: Callable[[], Any] = lambda: None) -> None:
        for micro_step in range(1, micro_steps + 1):
            between()
            with self.schedule.micro_step(boundary=micro_step == micro_steps):
                (self.loss() / micro_steps).backward()
        self.step()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def prefetch(self) -> Any:
        """The prefetch of the model; None where there is none."""
        gather = self.model._get_fsdp_state()._fsdp_param_group._all_gather_comm
        unit = getattr(getattr(gather, "_gather", gather), "prefetch", None)
        return unit and unit._prefetch


def samples_of(micro_step: int, rank: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1000 * micro_step + rank))


@contextmanager
def counted_fetches() -> Iterator[list[str]]:
    """The names of the units that are fetched ahead inside, in order."""
    fetched: list[str] = []
    fetch = UnitPrefetch._fetch

    def counted(self: UnitPrefetch, *args: Any) -> Any:
        fetched.append(self.name)
        return fetch(self, *args)

    with mock.patch.object(UnitPrefetch, "_fetch", counted):
        yield fetched
