"""What formulas say of a step is what a rehearsal of it runs; and the closed forms of the paper."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import CommunicationOptions
from lightning_mics.cost.collective import Collective
from lightning_mics.cost.step_traffic import Unit, find_units, step_traffic
from lightning_mics.planning.rehearsal.rehearse import rehearse
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.topology import Topology
from recipes.plan.dry_run import Training
from tests.support.campaign import campaign
from tests.support.jobs import JOBS, MODELS, Job, language_model, rehearsed

MICRO_STEPS = 5


LARGE = {  # jobs that no test could run
    "512 ranks": Job((512, 8, 128)),
    "512 ranks, once per step": Job((512, 8, 128), CommunicationOptions.NODE),
    "4096 ranks": Job((4096, 8, 64), precision="bf16-mixed"),
}


def predicted(name: str, job: Job) -> Counter[Collective]:
    with torch.device("meta"):
        model = Training(language_model(name))
    traffic = step_traffic(
        find_units(model, find_blocks(model)),
        job.topology,
        communication=job.communication,
        gathered_dtype=torch.float32 if job.precision == "32-true" else torch.bfloat16,
    )
    counts: Counter[Collective] = Counter()
    for repeated in traffic:
        counts[repeated.collective] += repeated.in_step(MICRO_STEPS)
    return counts


LEFT_TO_THE_CAMPAIGN = {  # all that is theirs is in another job, alone or with more
    "a node a group": "half precision",
    "a node a group, once per step": "once per step everywhere",
    "parameters once per step": "once per step everywhere",
    "gradients once per step": "replicas over nodes",
    "once per step": "replicas over nodes",
    "replicas, half of the bytes": "half of the bytes between nodes",
    "512 ranks": "512 ranks, once per step",
}


@pytest.mark.rehearsal
@pytest.mark.parametrize("job", [campaign(job) if job in LEFT_TO_THE_CAMPAIGN else job for job in [*JOBS, *LARGE]])
def test_a_rehearsal_runs_what_is_predicted(job: str) -> None:
    facts = {**JOBS, **LARGE}[job]
    name = list(MODELS)[len(job) % 2]
    played: Counter[Collective] = Counter()
    for ran in rehearsed(name, facts, backend="nccl", micro_steps=MICRO_STEPS, gradient_clip_val=None).ran:
        played[ran.collective] += ran.times
    assert played == predicted(name, facts)


OF_ADAPTERS = {
    "at every use": CommunicationOptions(cache_parameters="never", accumulate_gradients="shard"),
    "once per step": CommunicationOptions.NODE,
    "once per step everywhere": CommunicationOptions.RANK,
    "once per step, flat": CommunicationOptions(hierarchical=False, cache_parameters="node"),
    "some on ranks": replace(CommunicationOptions.NODE, frozen_on_ranks=0.67),
    "some on ranks, at every use else": CommunicationOptions(frozen_on_ranks=0.67),
}


class AdaptedLayer(nn.Module):
    """A frozen matrix beside two narrow ones that train."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(48, 48).requires_grad_(False)
        self.down, self.up = nn.Linear(48, 8, bias=False), nn.Linear(8, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


class Adapted(nn.Module):
    """Blocks with adapters, of which the first has none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdaptedLayer() for _ in range(3))
        self.layers[0].requires_grad_(False)
        self.head = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.rehearsal
@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_frozen_weights_are_neither_gathered_again_nor_reduced(name: str) -> None:
    topology = Topology(world_size=16, ranks_per_node=4, partition_size=8)
    played: Counter[Collective] = Counter()
    rehearsal = rehearse(
        Adapted,
        torch.zeros(2, 48),
        loss=lambda model, batch: model(batch),
        topology=topology,
        micro_steps=MICRO_STEPS,
        backend="nccl",
        communication=OF_ADAPTERS[name],
    )
    for ran in rehearsal.ran:
        played[ran.collective] += ran.times
    with torch.device("meta"):
        model = Adapted()
    counts: Counter[Collective] = Counter()
    for repeated in step_traffic(find_units(model, find_blocks(model)), topology, communication=OF_ADAPTERS[name]):
        counts[repeated.collective] += repeated.in_step(MICRO_STEPS)
    assert played == counts


@pytest.mark.parametrize(("n", "k", "p", "s"), [(512, 8, 128, 4), (64, 8, 16, 8), (32, 8, 8, 2), (16, 8, 4, 3)])
def test_bytes_are_those_of_the_paper(n: int, k: int, p: int, s: int) -> None:
    """MiCS, sections 3.3 and 3.4: received per rank, which is what is sent; M bytes that need no padding."""
    elements = n * 1000
    topology = Topology(world_size=n, ranks_per_node=k, partition_size=p)
    traffic = step_traffic(
        [Unit(((elements, 1),), is_root=True)],
        topology,
        gathered_dtype=torch.bfloat16,
    )
    sent = {(r.collective.kind, r.collective.group): r.collective.sent for r in traffic}
    parameters, gradients = 2 * elements, 4 * elements  # bytes
    if p > k:
        assert sent["all_gather", "rail"].between_bytes == (p - k) * parameters / (p * k)
        assert sent["all_gather", "node"].inside_bytes == (k - 1) * parameters / k
        assert sent["reduce_scatter", "rail"].between_bytes == (p - k) * gradients / (p * k)
    hop = next(r for r in traffic if r.collective.group == "replication")
    assert (hop.phases, hop.when, hop.in_step(s)) == (("backward",), "boundary", 1)
    assert sum(vars(hop.collective.sent).values()) == 2 * (gradients / p) * (n - p) / n
