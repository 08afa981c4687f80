"""What crosses nodes, and when: counted on real runs with parameters and gradients once per step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mics import Topology, TwoHopSchedule, create_groups, shard_model
from tests.collectives import Collective, RecordCollectives
from tests.forked import run_ranks
from tests.test_schedule import DIM, LAYERS, MODEL_BYTES, Stack

ONCE: dict[str, Any] = {"cross_node_gather": "once_per_step", "cross_node_reduce": "once_per_step"}
SPANNING = [(4, 2, 4), (8, 2, 4), (8, 2, 8), (8, 4, 8), (4, 1, 2), (4, 1, 4)]
TOPOLOGIES = [Topology(world_size=world, ranks_per_node=k, partition_size=p) for world, k, p in SPANNING]
UNITS = LAYERS + 1  # the blocks and the root


def _make(topology: Topology, **options: Any) -> tuple[Stack, TwoHopSchedule]:
    torch.manual_seed(0)
    model = Stack()
    return model, shard_model(model, create_groups(topology, device_type="cpu"), **options)


def _micro_step(model: Stack, schedule: TwoHopSchedule, *, boundary: bool) -> list[Collective]:
    with RecordCollectives() as recorded, schedule.micro_step(boundary=boundary):
        model(torch.randn(2, DIM)).backward()
    return recorded.seen


def _record(topology: Topology) -> list[list[Collective]]:
    """The collectives of three micro-steps, the last one the boundary, in the second window."""
    model, schedule = _make(topology, **ONCE)
    _micro_step(model, schedule, boundary=True)
    steps = []
    for boundary in (False, False, True):
        steps.append(_micro_step(model, schedule, boundary=boundary))
        assert all((parameter.grad is None) is (len(steps) == 0) for parameter in model.parameters())
    return steps


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_parameters_cross_in_the_first_micro_step_and_gradients_at_the_boundary_only(topology):
    for rank, micro_steps in enumerate(run_ranks(topology.world_size, _record, topology)):
        rail, node = topology.rail(rank), topology.node_group(rank)
        first, middle, boundary = (Counter((c.kind, c.ranks) for c in seen) for seen in micro_steps)
        inside: Counter[tuple[str, tuple[int, ...]]] = Counter()
        if len(node) > 1:  # the root stays gathered from forward to backward; gloo reduce-scatters by pairs
            inside = Counter({("all_gather", node): 2 * LAYERS + 1, ("all_to_all", node): UNITS})
        assert middle == inside
        assert first == inside + Counter({("all_gather", rail): UNITS})
        crossing = Counter({("all_to_all", rail): UNITS})
        if topology.replicas > 1:
            crossing["all_reduce", topology.replication_group(rank)] = UNITS
        assert boundary == inside + crossing


@pytest.mark.parametrize("topology", [*TOPOLOGIES, Topology(world_size=8, ranks_per_node=2, partition_size=2)], ids=str)
def test_a_node_sends_the_least_possible_between_nodes_whatever_the_number_of_micro_steps(topology):
    n = topology.nodes
    for of_rank in run_ranks(topology.world_size, _between_nodes, topology):
        for sent_bytes in of_rank:
            assert sent_bytes * topology.ranks_per_node == 2 * MODEL_BYTES * (n - 1) / n


def _between_nodes(topology: Topology) -> list[float]:
    """What this rank counts in a window of one micro-step, and of four."""
    model, schedule = _make(topology, **ONCE)
    counted = []
    for micro_steps in (1, 4):
        before = schedule.traffic.by_technique()
        for index in range(micro_steps):
            _micro_step(model, schedule, boundary=index == micro_steps - 1)
        after = schedule.traffic.by_technique()
        counted.append(
            sum(sent.between_bytes for sent in after.values()) - sum(s.between_bytes for s in before.values())
        )
    return counted


def test_gradients_are_none_until_the_boundary_also_without_replicas():
    for of_steps in run_ranks(4, _gradients_present, Topology(world_size=4, ranks_per_node=2, partition_size=4)):
        assert of_steps == [0, 0, UNITS, UNITS, UNITS]


def _gradients_present(topology: Topology) -> list[int]:
    """How many parameters have a gradient after each micro-step; the last two keep the gradients they found."""
    model, schedule = _make(topology, **ONCE)
    counts = []
    for boundary in (False, False, True, False, True):
        _micro_step(model, schedule, boundary=boundary)
        counts.append(sum(parameter.grad is not None for parameter in model.parameters()))
    return counts


def test_gradients_of_two_windows_add_up_if_nobody_clears_them():
    for once, plainly in run_ranks(4, _two_windows):
        assert plainly.norm() > 1e-3
        torch.testing.assert_close(once, plainly, rtol=1e-6, atol=1e-9)


def _two_windows() -> list[torch.Tensor]:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=4)
    results = []
    for options in (ONCE, {}):
        model, schedule = _make(topology, **options)
        torch.manual_seed(1)
        for boundary in (False, True, False, True):
            _micro_step(model, schedule, boundary=boundary)
        results.append(torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()]))
    return results


def test_an_abandoned_window_leaves_nothing_behind():
    for abandoned, fresh in run_ranks(4, _abandon):
        assert fresh.norm() > 1e-3
        assert torch.equal(abandoned, fresh)


def _abandon() -> list[torch.Tensor]:
    results = []
    for unfinished in (2, 0):
        model, schedule = _make(Topology(world_size=4, ranks_per_node=2, partition_size=4), **ONCE)
        for _ in range(unfinished):
            _micro_step(model, schedule, boundary=False)
        schedule.abandon_window()
        torch.manual_seed(1)
        for boundary in (False, True):
            _micro_step(model, schedule, boundary=boundary)
        results.append(torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()]))
    return results


def test_an_evaluation_with_fixed_weights_crosses_nodes_once():
    for rank, (loose, fixed) in enumerate(run_ranks(4, _evaluate)):
        rail = (rank % 2, rank % 2 + 2)
        assert [sum(c.ranks == rail for c in seen) for seen in loose] == [UNITS] * 3
        assert [sum(c.ranks == rail for c in seen) for seen in fixed] == [UNITS, 0, 0]


def _evaluate() -> tuple[list[list[Collective]], list[list[Collective]]]:
    model, schedule = _make(Topology(world_size=4, ranks_per_node=2, partition_size=4), **ONCE)

    def passes() -> list[list[Collective]]:
        recorded = []
        for _ in range(3):
            with RecordCollectives() as one, torch.no_grad():
                model(torch.randn(2, DIM))
            model.reshard()  # FSDP2 leaves the root gathered
            recorded.append(one.seen)
        return recorded

    loose = passes()
    with schedule.fixed_weights():
        return loose, passes()


def test_copies_and_sums_take_the_memory_of_their_share_and_none_after_the_boundary():
    for held in run_ranks(4, _held_bytes):
        assert held == [MODEL_BYTES // 2, 0]  # two ranks on each node


def _held_bytes() -> list[int]:
    model, schedule = _make(Topology(world_size=4, ranks_per_node=2, partition_size=4), **ONCE)
    held = []
    for boundary in (False, True):
        _micro_step(model, schedule, boundary=boundary)
        sums = [d._sums for d in schedule._deferrals.values()]
        copies = [copy._kept for copy in schedule._copies]
        by_kind = {sum(t.nbytes for t in kept if t is not None) for kept in (sums, copies)}
        held.append(*by_kind)
    return held


class TakesTurns(nn.Module):
    """Two blocks, of which a micro-step uses one, and a root without parameters in use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        return self.layers[turn](x).square().mean()


def test_a_block_whose_gradients_wait_crosses_at_a_boundary_that_does_not_use_it():
    for ours, alone in run_ranks(4, _skip_at_the_boundary):
        assert alone.norm() > 1e-3
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-9)


def _skip_at_the_boundary() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, alone = TakesTurns(), TakesTurns()
    alone.load_state_dict(model.state_dict())
    groups = create_groups(Topology(world_size=4, ranks_per_node=2, partition_size=4), device_type="cpu")
    schedule = shard_model(model, groups, **ONCE)
    x = torch.randn(2, DIM)  # the same on all ranks
    for turn, boundary in ((0, False), (1, True)):
        with schedule.micro_step(boundary=boundary):
            model(x, turn).backward()
        alone(x, turn).backward()
    return model.layers[0].weight.grad.full_tensor(), alone.layers[0].weight.grad


WIRE_SHAPES = [(4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 2, 4), (8, 2, 2)]


@pytest.mark.parametrize("shape", WIRE_SHAPES, ids=str)
@pytest.mark.parametrize("reduce", ["every_micro_step", "once_per_step"])
def test_bf16_on_the_wire_costs_its_rounding_and_sums_in_float32(shape, reduce):
    world, k, p = shape
    topology = Topology(world_size=world, ranks_per_node=k, partition_size=p)
    for errors, halves, equal in run_ranks(world, _wire, topology, reduce):
        assert errors["float32"] < 1e-6  # the same sums, another way
        assert 1e-5 < errors["bfloat16"] < 2**-8  # rounded once per leg: half a unit in the last place of 8 bits
        assert halves
        assert equal


def _wire(topology: Topology, reduce: str) -> tuple[dict[str, float], bool, bool]:
    """Relative errors of gradients by wire dtype; whether bf16 halves their bytes; whether replicas are bit-equal."""
    gradients, crossing = {}, {}
    for name, dtype in {"none": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        model, schedule = _make(topology, cross_node_reduce=reduce, cross_node_dtype=dtype)
        torch.manual_seed(7 + torch.distributed.get_rank())
        for boundary in (False, False, True):
            _micro_step(model, schedule, boundary=boundary)
        gradients[name] = torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()])
        sent = schedule.traffic.by_technique()
        crossing[name] = sum(s.between_bytes for technique, s in sent.items() if "gather" not in technique)
    errors = {name: float((g - gradients["none"]).norm() / gradients["none"].norm()) for name, g in gradients.items()}
    everyone = [torch.empty_like(gradients["bfloat16"]) for _ in range(topology.world_size)]
    torch.distributed.all_gather(everyone, gradients["bfloat16"])
    replicas = [everyone[rank] for rank in topology.replication_group(torch.distributed.get_rank())]
    return (
        errors,
        crossing["bfloat16"] * 2 == crossing["float32"] > 0,
        all(torch.equal(replica, replicas[0]) for replica in replicas),
    )
