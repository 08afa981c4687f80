"""Frozen weights of some blocks on each rank: which blocks, the same bits, and nothing sent for them after a step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.cost.step_traffic import find_units, step_traffic, unit_sizes
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.modules.frozen_blocks import units_on_ranks, used_in_backward
from tests.support.forked import run_cases

DIM, STEPS, MICRO_STEPS = 16, 4, 3
ADAPTERS = (0, 0, 4, 8, 4)  # rows of the adapters of each block

TOPOLOGIES = {
    "over nodes": Topology(world_size=4, ranks_per_node=2, partition_size=4),
    "in nodes": Topology(world_size=4, ranks_per_node=2, partition_size=2),
}
KINDS = {
    "over nodes": CommunicationOptions.NODE,
    "in nodes": CommunicationOptions(cache_parameters="never"),
}


class Layer(nn.Module):
    """A frozen layer, with two narrow matrices that train if it has adapters."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, DIM).requires_grad_(False)
        self.adapters = nn.ParameterList([torch.randn(rows, DIM) / DIM, torch.randn(DIM, rows)] if rows else [])

    def forward(self, x: Tensor) -> Tensor:
        kept = self.base(x)
        return kept + x @ self.adapters[0].T @ self.adapters[1].T if len(self.adapters) else kept


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM).requires_grad_(False)
        self.layers = nn.ModuleList(map(Layer, ADAPTERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def sizes() -> list[tuple[int, int]]:
    model = Network()
    return unit_sizes(find_units(model, find_blocks(model)))


@pytest.mark.parametrize(
    ("share", "blocks"), [(0.0, []), (0.19, []), (0.2, [1]), (0.4, [1, 4]), (0.6, [1, 2, 4]), (0.8, [1, 2, 3, 4])]
)
def test_the_blocks_that_save_the_most_for_their_memory_come_first(share: float, blocks: list[int]) -> None:
    """First one whose backward gathers it and that sends nothing again, then those with small adapters, of each end."""
    chosen = units_on_ranks(sizes(), share)
    assert chosen[0] == bool(blocks)  # the root is unsharded in a step in any case
    assert [block for block, on_rank in enumerate(chosen[1:]) if on_rank] == blocks
    assert used_in_backward(sizes()) == [True, False, True, True, True, True]


def test_only_blocks_with_frozen_weights_count() -> None:
    assert units_on_ranks([(10, 10), (20, 20), (20, 5), (20, 20), (20, 5)], 0.5) == [False, False, False, False, True]
    assert not any(units_on_ranks([(10, 10), (20, 20)], 1.0))


@pytest.mark.parametrize("value", [True, -0.1, 1.5, "node", None])
def test_a_value_that_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is neither 'auto' nor a share of the blocks, from 0 to 1"):
        CommunicationOptions(frozen_on_ranks=value)
    with pytest.raises(ValueError, match="frozen_on_ranks='auto' is for policies"):
        CommunicationOptions(frozen_on_ranks="auto").check_chosen()


# -- on ranks ----------------------------------------------------------------------------------------------------------


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))


def train(where: str, options: CommunicationOptions) -> dict[str, Any]:
    """Losses, weights, bytes of gathers in each step, inside nodes and between, and bytes of the caches."""
    torch.manual_seed(0)
    model, topology = Network(), TOPOLOGIES[where]
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses, inside, between = [], [0.0], [0.0]
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            with schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                loss = model(batch(dist.get_rank(), step, micro_step))
                loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        gathers = [sent for name, sent in schedule.traffic.by_technique().items() if name.startswith("gather ")]
        inside.append(sum(sent.inside_bytes for sent in gathers))
        between.append(sum(sent.between_bytes for sent in gathers))
    return {
        "losses": losses,
        "weights": {name: p.full_tensor() for name, p in model.named_parameters()},
        "inside": [after - before for before, after in pairwise(inside)],
        "between": [after - before for before, after in pairwise(between)],
        "cached": sum(tensor.nbytes for tensor in schedule.cache.tensors()),
    }


SHARES = (0.0, 0.4, 0.8, 1.0)
BESIDE = {
    "fetched ahead": replace(CommunicationOptions.NODE, inter_node_prefetch=1, frozen_on_ranks=0.4),
    "never on nodes": CommunicationOptions(accumulate_gradients="node", frozen_on_ranks=0.4),
    "some on nodes": replace(CommunicationOptions.NODE, cache_parameters=0.6, frozen_on_ranks=0.4),
}


@pytest.fixture(scope="module")
def runs() -> dict[Any, list[dict[str, Any]]]:
    cases: dict[Any, Any] = {
        (where, share): partial(train, where, replace(KINDS[where], frozen_on_ranks=share))
        for where in TOPOLOGIES
        for share in SHARES
    }
    cases |= {("over nodes", name): partial(train, "over nodes", options) for name, options in BESIDE.items()}
    left_out = replace(CommunicationOptions.NODE, allow_unused=True)
    cases |= {
        ("unused", share): partial(train, "over nodes", replace(left_out, frozen_on_ranks=share))
        for share in (0.0, 0.4)
    }
    return run_cases(4, cases)


def gathered(where: str, options: CommunicationOptions) -> tuple[float, float]:
    """Bytes that rank 0 sends in the gathers of a step that is not the first, inside nodes and between."""
    model = Network()
    traffic = step_traffic(find_units(model, find_blocks(model)), TOPOLOGIES[where], communication=options)
    sent = [
        (each.collective.sent, each.in_step(MICRO_STEPS)) for each in traffic if each.collective.kind == "all_gather"
    ]
    return sum(s.inside_bytes * times for s, times in sent), sum(s.between_bytes * times for s, times in sent)


@pytest.mark.parametrize("share", SHARES[1:])
@pytest.mark.parametrize("where", TOPOLOGIES)
def test_what_is_on_ranks_is_not_sent_again_and_the_bits_stay_the_same(
    where: str, share: float, runs: dict[Any, list[dict[str, Any]]]
) -> None:
    inside, between = gathered(where, replace(KINDS[where], frozen_on_ranks=share))
    for found, without in zip(runs[where, share], runs[where, 0.0], strict=True):
        assert found["losses"] == without["losses"]
        assert all(torch.equal(value, without["weights"][name]) for name, value in found["weights"].items())
        assert found["inside"][1:] == [inside] * (STEPS - 1)
        assert found["between"][1:] == without["between"][1:] == [between] * (STEPS - 1)
        assert inside < found["inside"][0]
    assert without["inside"][1] == gathered(where, KINDS[where])[0] > inside


def test_caches_on_ranks_take_the_bytes_of_their_blocks(runs: dict[Any, list[dict[str, Any]]]) -> None:
    bytes_of = [4 * elements for elements, _ in sizes()]
    for share in SHARES:
        on_ranks = units_on_ranks(sizes(), share)
        whole = sum(size for size, on_rank in zip(bytes_of, on_ranks, strict=True) if on_rank)
        for where, k in (("over nodes", 2), ("in nodes", 0)):
            on_nodes = (sum(bytes_of) - whole) // k if k else 0
            assert runs[where, share][0]["cached"] == whole + on_nodes


@pytest.mark.parametrize("beside", [*BESIDE, "unused"])
def test_the_same_bits_beside_other_options(beside: str, runs: dict[Any, list[dict[str, Any]]]) -> None:
    one, other = (
        (("unused", 0.4), ("unused", 0.0)) if beside == "unused" else (("over nodes", beside), ("over nodes", 0.0))
    )
    for found, without in zip(runs[one], runs[other], strict=True):
        assert found["losses"] == without["losses"]
        assert all(torch.equal(value, without["weights"][name]) for name, value in found["weights"].items())
