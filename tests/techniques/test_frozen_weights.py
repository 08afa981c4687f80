"""Frozen weights that are cached cross nodes once per job; what trains crosses them once per step, at the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from tests.support.campaign import campaign
from tests.support.forked import run_cases

DIM, RANK, LAYERS, STEPS = 16, 4, 3, 4
OVER_NODES = Topology(world_size=4, ranks_per_node=2, partition_size=4)
NODES = 2


class Adapted(nn.Module):
    """A frozen linear layer, and what trains: two narrow matrices beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, DIM, dtype=dtype).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, DIM) / DIM)
        self.up = nn.Parameter(torch.randn(DIM, RANK) / RANK)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        return kept + x @ self.down.T @ self.up.T


class Bytes(nn.Module):
    """The same with a base in bytes and a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(DIM, DIM) / 4
        scale = whole.abs().amax(1, keepdim=True) / 127
        self.base = nn.Parameter((whole / scale + 128).round().to(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.down = nn.Parameter(torch.randn(RANK, DIM) / DIM)
        self.up = nn.Parameter(torch.randn(DIM, RANK) / RANK)

    def forward(self, x: Tensor) -> Tensor:
        base = (self.base.to(x.dtype) - 128) * self.scale
        return x @ base.T + x @ self.down.T @ self.up.T


class Network(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


BASES: dict[str, Callable[[], nn.Module]] = {
    "float32": partial(Adapted, torch.float32),
    "bfloat16": partial(Adapted, torch.bfloat16),
    "bytes": Bytes,
}


def network(base: str) -> Network:
    torch.manual_seed(0)
    return Network(BASES[base])


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))


def train(
    base: str,
    options: CommunicationOptions,
    micro_steps: int,
    *,
    topology: Topology = OVER_NODES,
    changes: Callable[[Any, int], None] = lambda model, step: None,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses of each step, bytes that the node sends to others in each, and the weights after all."""
    model = network(base)
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses, sent = [], [0.0]
    for step in range(STEPS):
        changes(model, step)
        total = torch.zeros(())
        for micro_step in range(micro_steps):
            with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                loss = model(batch(dist.get_rank(), step, micro_step)) / micro_steps
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        by_technique = schedule.traffic.by_technique().values()
        sent.append(topology.ranks_per_node * sum(each.between_bytes for each in by_technique))
    return losses, [after - before for before, after in pairwise(sent)], whole(model)


def alone(base: str, micro_steps: int, world_size: int = 4) -> list[float]:
    model = network(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro_step in range(micro_steps):
            for rank in range(world_size):
                loss = model(batch(rank, step, micro_step)) / micro_steps / world_size
                loss.backward()
                total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


NODE, NEVER = CommunicationOptions.NODE, CommunicationOptions(cache_parameters="never", accumulate_gradients="node")
ADAPTERS = LAYERS * 2 * DIM * RANK * 4  # bytes
CASES, IN_CAMPAIGN = [("float32", 1), ("float32", 4), ("bytes", 4)], [("bfloat16", 4)]


@pytest.fixture(scope="module")
def runs(in_campaign: bool) -> dict[Any, list[Any]]:
    chosen = CASES + IN_CAMPAIGN if in_campaign else CASES
    cases = {(base, s, kind): (base, options, s) for base, s in chosen for kind, options in KINDS.items()}
    return run_cases(4, {name: partial(train, *arguments) for name, arguments in cases.items()})


KINDS = {
    "cached": NODE,
    "never": NEVER,
    "on ranks": CommunicationOptions.RANK,
    "never, sums on ranks": CommunicationOptions(cache_parameters="never", accumulate_gradients="rank"),
}
BESIDE = {"cached": "never", "on ranks": "never, sums on ranks"}  # the same sums in the same order


def _pairs(found: dict[Any, list[Any]], *case: Any) -> list[tuple[Any, Any]]:
    """Each run with a cache beside the one without."""
    return [
        pair
        for kind, beside in BESIDE.items()
        for pair in zip(found[(*case, kind)], found[(*case, beside)], strict=True)
    ]


@pytest.mark.parametrize(("base", "micro_steps"), [*CASES, *(campaign(*case) for case in IN_CAMPAIGN)])
def test_only_adapters_cross_nodes_after_the_first_step(
    base: str, micro_steps: int, runs: dict[Any, list[Any]]
) -> None:
    bound = 2 * ADAPTERS * (NODES - 1) / NODES
    for (losses, sent, weights), others in _pairs(runs, base, micro_steps):
        assert sent[0] > 1.3 * bound
        assert all(each == pytest.approx(bound, rel=1e-6) for each in sent[1:])
        assert losses == others[0]
        assert all(torch.equal(value, others[2][name]) for name, value in weights.items())
        assert losses == pytest.approx(alone(base, micro_steps), abs=1e-5 if base != "bfloat16" else 1e-3)


# -- changes of frozen weights ----------------------------------------------------------------------------------------


def _in_place(model: Any, step: int) -> None:
    if step == 2:
        with torch.no_grad():
            model.layers[1].base.weight.mul_(0.5)


def _by_data(model: Any, step: int) -> None:
    if step == 2:
        model.layers[1].base.weight.data.mul_(0.5)


def _by_assignment(model: Any, step: int) -> None:
    if step == 2:
        weight = model.layers[1].base.weight
        weight.data = weight.data * 0.5


def _by_loading(model: Any, step: int) -> None:
    if step == 2:
        state = whole(model)
        state["layers.1.base.weight"] *= 0.5
        model.load_state_dict(state)


CHANGES = {"in place": _in_place, ".data": _by_data, "assigned": _by_assignment, "loaded": _by_loading}


def _unfreeze(model: Any, step: int) -> None:
    if step == 1:
        model.layers[1].base.weight.requires_grad_(True)


def _unfrozen(options: CommunicationOptions) -> Any:
    """With an optimizer that has all parameters from the beginning, as Lightning's finetuning callbacks add them."""
    original = torch.optim.AdamW

    def of_all(parameters: Any, **kwargs: Any) -> Any:
        return original(parameters, **kwargs)

    model = network("float32")
    schedule = shard_model(model, create_partition_groups(OVER_NODES, device_type="cpu"), communication=options)
    optimizer = of_all(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        _unfreeze(model, step)
        with schedule.micro_step(boundary=True):
            loss = model(batch(dist.get_rank(), step, 0))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, whole(model)


def _in_raw_memory(model: Any, step: int) -> None:
    if step == 2:
        model.layers[1].base.weight.to_local().numpy()[...] *= 0.5


def _refused(options: CommunicationOptions) -> str:
    with pytest.raises(RuntimeError) as caught:
        train("float32", options, 2, changes=_in_raw_memory)
    return str(caught.value)


def _changed_and_said(options: CommunicationOptions) -> Any:
    model = network("float32")
    schedule = shard_model(model, create_partition_groups(OVER_NODES, device_type="cpu"), communication=options)
    losses = []
    for step in range(3):
        if step == 2:
            _in_raw_memory(model, step)
            schedule.invalidate_cache()
        with schedule.micro_step(boundary=True):
            loss = model(batch(dist.get_rank(), step, 0))
            loss.backward()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def changed() -> dict[Any, list[Any]]:
    cases: dict[Any, Any] = {
        (name, kind): partial(train, "float32", options, 2, changes=change)
        for name, change in CHANGES.items()
        for kind, options in KINDS.items()
    }
    cases |= {("unfrozen", kind): partial(_unfrozen, options) for kind, options in KINDS.items()}
    cases |= {("said", kind): partial(_changed_and_said, options) for kind, options in KINDS.items()}
    cases |= {("refused", kind): partial(_refused, KINDS[kind]) for kind in ("cached", "on ranks")}
    return run_cases(4, cases)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_frozen_weight_is_used_by_the_next_forward(change: str, changed: dict[Any, list[Any]]) -> None:
    for cached, never in _pairs(changed, change):
        assert cached[0] == never[0]
        assert all(torch.equal(value, never[2][name]) for name, value in cached[2].items())


def test_an_unfrozen_weight_trains_as_without_a_cache(changed: dict[Any, list[Any]]) -> None:
    for cached, never in _pairs(changed, "unfrozen"):
        assert cached[0] == never[0]
        assert all(torch.equal(value, never[1][name]) for name, value in cached[1].items())


def test_a_change_in_raw_memory_is_refused_at_the_boundary_unless_it_is_said(changed: dict[Any, list[Any]]) -> None:
    for message in (*changed["refused", "cached"], *changed["refused", "on ranks"]):
        assert "in raw memory" in message and "invalidate_cache()" in message
    assert changed["said", "cached"] == changed["said", "never"] == changed["said", "on ranks"]


@pytest.mark.campaign
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("base", BASES)
def test_the_same_on_eight_ranks(base: str, nodes: int) -> None:
    topology = Topology(world_size=8, ranks_per_node=8 // nodes, partition_size=8)
    cases = {kind: partial(train, base, options, 4, topology=topology) for kind, options in KINDS.items()}
    found = run_cases(8, cases)
    bound = 2 * ADAPTERS * (nodes - 1) / nodes
    for (losses, sent, _), never in _pairs({(kind,): of_kind for kind, of_kind in found.items()}):
        assert losses == never[0]
        assert all(each == pytest.approx(bound, rel=1e-6) for each in sent[1:])


BESIDE_OTHERS = {
    "prefetch": replace(NODE, inter_node_prefetch=1),
    "prefetch, cached on ranks": CommunicationOptions(
        cache_parameters="rank", accumulate_gradients="node", inter_node_prefetch=1
    ),
    "blocks that ranks may leave out": replace(NODE, allow_unused=True),
    "messages in a dtype of their own": replace(NODE, inter_node_reduce_dtype=torch.float32),
}


@pytest.mark.campaign
def test_other_options_leave_bytes_and_losses_as_they_are() -> None:
    cases = {(base, name): partial(train, base, o, 4) for base in BASES for name, o in BESIDE_OTHERS.items()}
    found = run_cases(4, {**cases, **{(base, "alone"): partial(train, base, NODE, 4) for base in BASES}})
    for base, name in cases:
        losses, sent, _ = found[base, name][0]
        assert losses == pytest.approx(found[base, "alone"][0][0], abs=1e-6)
        assert sent[1:] == found[base, "alone"][0][1][1:] == [ADAPTERS] * (STEPS - 1)  # 2 A / 2
