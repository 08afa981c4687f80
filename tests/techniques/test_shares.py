"""Caches and sums on nodes for a share of the blocks: which blocks, the results, the bytes and the memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import CommunicationOptions
from lightning_mics.cost.step_traffic import find_units, step_traffic
from lightning_mics.policy.memory import measure_model
from lightning_mics.policy.places import bytes_of_share, largest_share
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.options import share_of, spread_over
from lightning_mics.sharding.shard_model import shard_model
from lightning_mics.techniques.partition_groups import create_partition_groups
from lightning_mics.topology import Topology
from tests.support.beside_ddp import largest_gap, rank_inputs, unsharded_state
from tests.support.campaign import campaign
from tests.support.forked import run_cases

WIDTHS = (16, 8, 24, 8, 32)  # of blocks
MICRO_STEPS = 3
PLACES = {
    "caches": CommunicationOptions(cache_parameters=0.4),
    "sums": CommunicationOptions(accumulate_gradients=0.6),
    "both": CommunicationOptions(cache_parameters=0.8, accumulate_gradients=0.2),
    "all blocks": CommunicationOptions(cache_parameters=1.0, accumulate_gradients=1.0),
    "sums beside a whole cache": CommunicationOptions(cache_parameters="node", accumulate_gradients=0.5),
    "sums beside caches on ranks": CommunicationOptions(cache_parameters="rank", accumulate_gradients=0.4),
    "caches beside sums on ranks": CommunicationOptions(cache_parameters=0.4, accumulate_gradients="rank"),
}
TOPOLOGIES = {
    "one partition group": Topology(world_size=4, ranks_per_node=2, partition_size=4),
    "one rank a node": Topology(world_size=4, ranks_per_node=1, partition_size=2),
}


@pytest.mark.parametrize(
    ("blocks", "share", "kept"),
    [
        (4, 0.5, [0, 1, 0, 1]),
        (4, 0.49, [0, 0, 0, 1]),
        (6, 1 / 3, [0, 0, 1, 0, 0, 1]),
        (5, 0.8, [0, 1, 1, 1, 1]),
        (3, 1.0, [1, 1, 1]),
        (3, 0.1, [0, 0, 0]),
        (0, 0.5, []),
    ],
)
def test_blocks_of_a_share_are_spread_over_the_depth(blocks: int, share: float, kept: list[int]) -> None:
    assert spread_over(blocks, share) == [bool(each) for each in kept]


def test_a_quotient_stands_for_its_number_of_blocks() -> None:
    for blocks in range(1, 200):
        assert all(sum(spread_over(blocks, count / blocks)) == count for count in range(blocks + 1))


@pytest.mark.parametrize("option", ["cache_parameters", "accumulate_gradients"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan"), 1, True, "0.5", None])
def test_what_is_no_share_is_an_error_that_names_the_values(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}=.* is neither one of 'auto', .* nor a share of the blocks"):
        CommunicationOptions(**{option: value})


def test_a_share_of_the_sums_needs_a_stage_between_nodes() -> None:
    over_nodes = Topology(world_size=4, ranks_per_node=2, partition_size=4)
    with pytest.raises(ValueError, match=r"accumulate_gradients=0.5 needs a separate inter-node stage"):
        CommunicationOptions(hierarchical=False, accumulate_gradients=0.5).check(over_nodes)
    with pytest.raises(ValueError, match="two_hop=False"):
        CommunicationOptions(two_hop=False, accumulate_gradients=0.5)


@pytest.mark.parametrize("blocks", [1, 3, 4, 96, 124, 126])
def test_a_share_that_is_chosen_can_be_typed_again(blocks: int) -> None:
    for count in range(1, blocks + 1):
        share = share_of(count, blocks)
        assert len(str(share)) <= len("0.999") and sum(spread_over(blocks, share)) == count
    assert (share_of(1, 4), share_of(43, 124), share_of(124, 124)) == (0.25, 0.35, 1.0)


def test_the_largest_share_is_the_most_blocks_that_fit() -> None:
    sizes = [100, 300, 100, 300]
    assert [bytes_of_share(count / 4, sizes, 2) for count in range(5)] == [0, 150, 300, 350, 400]
    assert [largest_share(sizes, 2, free) for free in (149, 150, 349, 350, 10**9)] == [None, 0.25, 0.5, 0.75, 1.0]
    assert largest_share([], 2, 10**9) is None


class Network(nn.Module):
    """Blocks of different sizes between two layers of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, w), nn.Tanh(), nn.Linear(w, 4)) for w in WIDTHS)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:  # [samples, 4] -> same
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


IN_CAMPAIGN = [(place, "one partition group", None) for place in ("sums", "sums beside a whole cache")]
OF_EACH_RUN = [(place, "one partition group", None) for place in PLACES]
OF_EACH_RUN = [case for case in OF_EACH_RUN if case not in IN_CAMPAIGN]
OF_EACH_RUN += [("both", topology, torch.bfloat16) for topology in TOPOLOGIES]
CASES = [*OF_EACH_RUN, *(campaign(*case) for case in IN_CAMPAIGN)]


@pytest.fixture(scope="module")
def trained(in_campaign: bool) -> Any:
    """By case, what each rank of a job has seen."""
    cases = OF_EACH_RUN + IN_CAMPAIGN if in_campaign else OF_EACH_RUN
    return run_cases(4, {case: partial(train, *case) for case in cases})


@cache
def in_paper(topology: str, wire: torch.dtype | None) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses with each collective as often as in the paper."""
    torch.manual_seed(0)
    model = Network()
    _, losses = step_windows(model, TOPOLOGIES[topology], CommunicationOptions(inter_node_reduce_dtype=wire))
    return unsharded_state(model), losses


def train(place: str, topology: str, wire: torch.dtype | None) -> dict[str, Any]:
    """Train two windows with shares, and as in the paper; compare weights, bytes and memory."""
    torch.manual_seed(0)
    model, options = Network(), replace(PLACES[place], inter_node_reduce_dtype=wire)
    size, units = measure_model(model, find_blocks(model).values()), find_units(model, find_blocks(model))
    schedule, losses = step_windows(model, TOPOLOGIES[topology], options)
    weights, expected = in_paper(topology, wire)
    sent = list(schedule.traffic.by_technique().values())
    predicted = step_traffic(units, TOPOLOGIES[topology], communication=options).sent(MICRO_STEPS)
    k = TOPOLOGIES[topology].local_ranks_per_partition_group
    return {
        "gap": largest_gap(unsharded_state(model), weights),
        "losses": max(abs(one - other) for one, other in zip(losses, expected, strict=True)),
        "between": (sum(each.between_bytes for each in sent), 2 * predicted.between_bytes),
        "inside": (sum(each.inside_bytes for each in sent), 2 * predicted.inside_bytes),
        "cached": (
            sum(tensor.nbytes for tensor in schedule.cache.tensors()),
            bytes_of_share(0.4, size.blocks_gathered_bytes, k),
        ),
    }


def step_windows(model: nn.Module, topology: Topology, options: CommunicationOptions) -> tuple[Any, list[float]]:
    groups = create_partition_groups(topology, device_type="cpu")
    schedule = shard_model(model, groups, communication=options)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for micro_step in range(2 * MICRO_STEPS):
        boundary = (micro_step + 1) % MICRO_STEPS == 0
        with schedule.micro_step(boundary=boundary):
            loss = model(rank_inputs(micro_step)).square().mean() / MICRO_STEPS
            loss.backward()
        losses.append(float(loss.detach()))
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
    return schedule, losses


@pytest.mark.parametrize(("place", "topology", "wire"), CASES)
def test_losses_and_weights_are_those_of_the_paper(
    place: str, topology: str, wire: torch.dtype | None, trained: Any
) -> None:
    rounding = 1e-6 if wire is None else 3e-3  # sums cross nodes once, or in each micro-step
    for seen in trained[place, topology, wire]:
        assert seen["gap"] < rounding
        assert seen["losses"] < rounding


@pytest.mark.parametrize(("place", "topology", "wire"), CASES)
def test_bytes_are_predicted_exactly(place: str, topology: str, wire: torch.dtype | None, trained: Any) -> None:
    of_rank_0 = trained[place, topology, wire][0]
    for tier in ("between", "inside"):
        measured, predicted = of_rank_0[tier]
        assert measured == predicted
    assert of_rank_0["between"][0] > 0


def test_caches_take_the_memory_of_their_blocks(trained: Any) -> None:
    for seen in trained["caches", "one partition group", None]:
        held, of_share = seen["cached"]
        assert held == pytest.approx(of_share, rel=0.05)  # shards are padded
