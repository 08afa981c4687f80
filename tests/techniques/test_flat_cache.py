"""Parameters cached on nodes where collectives are flat: the same bits as without, and fewer bytes between nodes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.collectives.traffic import Sent
from lightning_mics.cost.step_traffic import find_units, step_traffic
from lightning_mics.sharding.blocks import find_blocks
from tests.support.beside_ddp import unsharded_state
from tests.support.campaign import campaign
from tests.support.forked import run_cases
from tests.support.groups import groups_for

DIM, LAYERS, STEPS = 12, 3, 3
FLAT = CommunicationOptions(hierarchical=False)
CACHED = {
    "all": CommunicationOptions(hierarchical=False, cache_parameters="node"),
    "two of three blocks": CommunicationOptions(hierarchical=False, cache_parameters=0.67),
    "all, sums on ranks": CommunicationOptions(
        hierarchical=False, cache_parameters="node", accumulate_gradients="rank"
    ),
}
OVER_TWO, REPLICAS = Topology(world_size=4, ranks_per_node=2, partition_size=4), (8, 2, 4)
MODELS = ["all trains", "adapters"]


class Layer(nn.Module):
    """A matrix, and two narrow ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, DIM)
        self.down, self.up = nn.Linear(DIM, 3, bias=False), nn.Linear(3, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(LAYERS)), nn.Linear(DIM, 1))
    if kind == "adapters":
        model.requires_grad_(False)
        for layer in model[1:LAYERS]:
            layer.down.requires_grad_(True)
            layer.up.requires_grad_(True)
    return model


def train(kind: str, options: CommunicationOptions, micro_steps: int, topology: Topology) -> dict[str, Any]:
    """Losses, weights, and the bytes of gathers in the last step, of this rank."""
    model = network(kind)
    schedule = shard_model(model, groups_for(topology, options), communication=options, block_classes=[Layer])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, gathered = [], Sent()
    for step in range(STEPS):
        before = of_gathers(schedule)
        for micro_step in range(micro_steps):
            seed = 100 * step + 10 * micro_step + dist.get_rank()
            x = torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed))
            with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                loss = model(x).square().mean() / micro_steps
                loss.backward()
            losses.append(float(loss.detach()))
        after = of_gathers(schedule)
        gathered = Sent(after.inside_bytes - before.inside_bytes, after.between_bytes - before.between_bytes)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:  # FSDP2 leaves the root gathered after an evaluation, for the next step
            with schedule.cached_weights(), torch.no_grad():
                losses.append(float(sum(model(x).sum() for _ in range(2))))
    kept = sum(tensor.nbytes for tensor in schedule.cache.tensors())
    return {"losses": losses, "weights": unsharded_state(model), "gathered": gathered, "kept": kept}


def of_gathers(schedule: Any) -> Sent:
    techniques = schedule.traffic.by_technique()
    return sum((sent for name, sent in techniques.items() if name.startswith("gather")), Sent())


def predicted(kind: str, options: CommunicationOptions, micro_steps: int, topology: Topology) -> Sent:
    model = network(kind)
    found = Sent()
    for repeated in step_traffic(find_units(model, find_blocks(model, [Layer])), topology, communication=options):
        if repeated.collective.kind == "all_gather":
            sent, times = repeated.collective.sent, repeated.in_step(micro_steps)
            found += Sent(sent.inside_bytes * times, sent.between_bytes * times)
    return found


CASES = [("all", kind, micro_steps) for kind in MODELS for micro_steps in (1, 3)]
CASES += [(cached, "adapters", 3) for cached in CACHED if cached != "all"]


@pytest.fixture(scope="module", params=[OVER_TWO, campaign(Topology(world_size=8, ranks_per_node=2, partition_size=4))])
def topology(request: pytest.FixtureRequest) -> Topology:
    return request.param


@pytest.fixture(scope="module")
def trained(topology: Topology) -> Any:
    """By case, what each rank has seen."""
    cases: dict[Any, Any] = {case: partial(train, case[1], CACHED[case[0]], case[2], topology) for case in CASES}
    for _, kind, micro_steps in CASES:
        cases["never", kind, micro_steps] = partial(train, kind, FLAT, micro_steps, topology)
    return run_cases(topology.world_size, cases)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_weights_are_those_without_caches_bit_for_bit(case: tuple[str, str, int], trained: Any) -> None:
    cached, kind, micro_steps = case
    for ours, theirs in zip(trained[case], trained["never", kind, micro_steps], strict=True):
        if "ranks" in cached:  # the order of sums is another
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
            continue
        assert ours["losses"] == theirs["losses"]
        assert all(torch.equal(weight, theirs["weights"][name]) for name, weight in ours["weights"].items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathers_between_nodes_run_once_per_step_and_for_what_trains(
    case: tuple[str, str, int], trained: Any, topology: Topology
) -> None:
    cached, kind, micro_steps = case
    found = trained[case][0]["gathered"]
    assert found == predicted(kind, CACHED[cached], micro_steps, topology)
    every_use = trained["never", kind, micro_steps][0]["gathered"].between_bytes
    if (cached, kind) == ("all", "all trains"):
        model, ranks = network(kind), topology.partition_size
        of_ring = sum(unit.elements(ranks) * 4 for unit in find_units(model, find_blocks(model, [Layer])))
        assert sum(each["gathered"].between_bytes for each in trained[case]) == (
            topology.world_size / topology.ranks_per_node * of_ring * (ranks - 1) / ranks
        )
    assert 0 < found.between_bytes < every_use


def test_a_rank_keeps_the_unsharded_parameters_divided_by_the_ranks_of_a_node(trained: Any, topology: Topology) -> None:
    model = network("all trains")
    whole = sum(4 * unit.elements(topology.partition_size) for unit in find_units(model, find_blocks(model, [Layer])))
    assert all(seen["kept"] == whole / topology.ranks_per_node for seen in trained["all", "all trains", 3])


def without_groups(topology: Topology) -> str:
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=False)
    with pytest.raises(ValueError, match="caches_on_nodes") as error:
        shard_model(network("all trains"), groups, communication=CACHED["all"], block_classes=[Layer])
    return str(error.value)


def test_groups_without_nodes_are_an_error_that_says_what_to_give() -> None:
    for said in run_cases(4, {"": partial(without_groups, OVER_TWO)})[""]:
        assert said.startswith("cache_parameters='node' gathers inside nodes")
        assert said.endswith("give create_partition_groups caches_on_nodes=True")
