"""What is communicated, and when: counted on real runs that communicate once per step, cached by nodes or by ranks.

All runs on as many ranks share one set of processes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_mics import AccumulationSchedule, CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch import streams
from lightning_mics._torch.fsdp import _param_groups, own_grad
from lightning_mics.techniques.parameter_cache import ParameterCache
from tests.support.campaign import campaign
from tests.support.forked import run_cases
from tests.support.models import DIM, LAYERS, MODEL_BYTES, Stack
from tests.support.recorded import Collective, RecordCollectives

NODE, RANK = CommunicationOptions.NODE, CommunicationOptions.RANK


LEVELS = {"cached by nodes": NODE, "cached by ranks": RANK}


def topology_of(world_size: int, ranks_per_node: int, partition_size: int) -> Topology:
    return Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size)


SPANNING = [topology_of(*shape) for shape in [(4, 2, 4), (8, 2, 4), (4, 1, 2), (4, 1, 4)]]


MORE_SPANNING = [topology_of(*shape) for shape in [(8, 2, 8), (8, 4, 8)]]  # more nodes, or ranks on each


TOPOLOGIES = [*SPANNING, *map(campaign, MORE_SPANNING)]


ON_A_NODE = topology_of(4, 2, 2)


OVER_TWO = Topology(world_size=4, ranks_per_node=2, partition_size=4)


REDUCE_DTYPES = [None, torch.float64]


UNITS = LAYERS + 1  # the blocks and the root


def make(topology: Topology, options: CommunicationOptions) -> tuple[Stack, AccumulationSchedule]:
    torch.manual_seed(0)
    model = Stack()
    return model, shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)


def micro_step(model: Stack, schedule: AccumulationSchedule, *, boundary: bool) -> None:
    with schedule.micro_step(boundary=boundary):
        model(torch.randn(2, DIM)).backward()


def recorded_micro_step(model: Stack, schedule: AccumulationSchedule, *, boundary: bool) -> list[Collective]:
    with RecordCollectives() as recorded:
        micro_step(model, schedule, boundary=boundary)
    return recorded.seen


def record(topology: Topology, options: CommunicationOptions) -> tuple[list[list[Collective]], list[float]]:
    """The collectives of three micro-steps, the last one the boundary, in the second window; the bytes of both windows.

    The first window has one micro-step. Bytes are those that this rank sends to other nodes.
    """
    model, schedule = make(topology, options)
    steps, sent_bytes = [], [0.0]
    micro_step(model, schedule, boundary=True)
    sent_bytes.append(between_nodes(schedule))
    for boundary in (False, False, True):
        steps.append(recorded_micro_step(model, schedule, boundary=boundary))
        assert all((parameter.grad is None) is (len(steps) == 0) for parameter in model.parameters())
    sent_bytes.append(between_nodes(schedule))
    return steps, [later - earlier for earlier, later in pairwise(sent_bytes)]


def between_nodes(schedule: AccumulationSchedule) -> float:
    """What this rank has sent to other nodes so far, in bytes."""
    return sum(sent.between_bytes for sent in schedule.traffic.by_technique().values())


Runs = dict[Any, list[Any]]


@pytest.fixture(scope="module")
def runs(in_campaign: bool) -> Runs:
    """By topology and level, what each rank has seen and sent."""
    seen: Runs = {}
    topologies = [*SPANNING, ON_A_NODE, *(MORE_SPANNING if in_campaign else [])]
    for world_size in (4, 8):
        cases: dict[Any, Any] = {}
        for topology, level in product(topologies, LEVELS):
            if topology.world_size == world_size:
                cases[topology, level] = partial(record, topology, LEVELS[level])
        seen |= run_cases(world_size, cases)
    return seen


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_inter_node_gathers_run_in_the_first_micro_step_and_reductions_at_the_boundary(
    topology: Topology, runs: Runs
) -> None:
    for rank, (micro_steps, _) in enumerate(runs[topology, "cached by nodes"]):
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


@pytest.mark.parametrize("topology", [*TOPOLOGIES, ON_A_NODE], ids=str)
def test_parameters_cached_by_ranks_are_communicated_in_the_first_micro_step_and_at_the_boundary_only(
    topology: Topology, runs: Runs
) -> None:
    for rank, (micro_steps, _) in enumerate(runs[topology, "cached by ranks"]):
        first, middle, boundary = (Counter((c.kind, c.ranks) for c in seen) for seen in micro_steps)
        rail, node = topology.rail(rank), topology.node_group(rank)
        legs = [leg for leg in (rail, node) if len(leg) > 1]
        assert middle == Counter()
        assert first == Counter({("all_gather", leg): UNITS for leg in legs})
        reductions = Counter({("all_to_all", leg): UNITS for leg in legs})  # gloo reduce-scatters by pairs
        if topology.replicas > 1:
            reductions["all_reduce", topology.replication_group(rank)] = UNITS
        assert boundary == reductions


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("topology", [*TOPOLOGIES, ON_A_NODE], ids=str)
def test_a_node_sends_the_least_possible_for_any_number_of_micro_steps(
    topology: Topology, level: str, runs: Runs
) -> None:
    n = topology.nodes
    for _, of_windows in runs[topology, level]:
        for sent_bytes in of_windows:
            assert sent_bytes * topology.ranks_per_node == 2 * MODEL_BYTES * (n - 1) / n


@pytest.fixture(scope="module")
def over_two() -> Runs:
    """By claim and level, what each rank of two nodes has seen."""
    cases: dict[Any, Any] = {"memory of nodes": held_on_nodes, "memory of ranks": held_on_ranks}
    for level, options in LEVELS.items():
        cases["gradients", level] = partial(gradients_present, options)
        cases["two windows", level] = partial(two_windows, options)
        cases["abandoned", level] = partial(abandon, options)
        cases["evaluation", level] = partial(evaluate, options)
        for dtype in REDUCE_DTYPES:
            cases["skipped", level, dtype] = partial(skip_at_the_boundary, options, dtype)
    return run_cases(4, cases)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_none_until_the_boundary_also_without_replicas(level: str, over_two: Runs) -> None:
    for of_steps in over_two["gradients", level]:
        assert of_steps == [0, 0, UNITS, UNITS, UNITS]


def gradients_present(options: CommunicationOptions) -> list[int]:
    """Numbers of parameters with a gradient after each micro-step; gradients are never cleared."""
    model, schedule = make(OVER_TWO, options)
    counts = []
    for boundary in (False, False, True, False, True):
        micro_step(model, schedule, boundary=boundary)
        counts.append(sum(parameter.grad is not None for parameter in model.parameters()))
    return counts


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_two_windows_add_up_without_zero_grad(level: str, over_two: Runs) -> None:
    for once, plainly in over_two["two windows", level]:
        assert plainly.norm() > 1e-3
        torch.testing.assert_close(once, plainly, rtol=1e-6, atol=1e-9)


def two_windows(kept: CommunicationOptions) -> list[torch.Tensor]:
    results = []
    for options in (kept, CommunicationOptions.PAPER):
        model, schedule = make(OVER_TWO, options)
        torch.manual_seed(1)
        for boundary in (False, True, False, True):
            micro_step(model, schedule, boundary=boundary)
        results.append(torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()]))
    return results


@pytest.mark.parametrize("level", LEVELS)
def test_an_abandoned_window_leaves_no_gradients(level: str, over_two: Runs) -> None:
    for abandoned, fresh in over_two["abandoned", level]:
        assert fresh.norm() > 1e-3
        assert torch.equal(abandoned, fresh)


def abandon(options: CommunicationOptions) -> list[torch.Tensor]:
    results = []
    for unfinished in (2, 0):
        model, schedule = make(OVER_TWO, options)
        for _ in range(unfinished):
            micro_step(model, schedule, boundary=False)
        schedule.window.abandon()
        torch.manual_seed(1)
        for boundary in (False, True):
            micro_step(model, schedule, boundary=boundary)
        results.append(torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()]))
    return results


@pytest.mark.parametrize("level", LEVELS)
def test_an_evaluation_with_cached_weights_crosses_nodes_once(level: str, over_two: Runs) -> None:
    for rank, (loose, fixed) in enumerate(over_two["evaluation", level]):
        rail = (rank % 2, rank % 2 + 2)
        assert [sum(c.ranks == rail for c in seen) for seen in loose] == [UNITS] * 3
        assert [sum(c.ranks == rail for c in seen) for seen in fixed] == [UNITS, 0, 0]


def evaluate(options: CommunicationOptions) -> tuple[list[list[Collective]], list[list[Collective]]]:
    model, schedule = make(OVER_TWO, options)

    def passes() -> list[list[Collective]]:
        recorded = []
        for _ in range(3):
            with RecordCollectives() as one, torch.no_grad():
                model(torch.randn(2, DIM))
            model.reshard()  # FSDP2 leaves the root gathered
            recorded.append(one.seen)
        return recorded

    loose = passes()
    with schedule.cached_weights():
        return loose, passes()


def test_node_caches_and_gradients_take_their_share_of_memory_until_a_window_is_abandoned(over_two: Runs) -> None:
    share = MODEL_BYTES // 2  # two ranks on each node
    for held in over_two["memory of nodes"]:
        assert held == [(share, share), (share, share), (share, share), (0, 0)]


def held_on_nodes() -> list[tuple[int, int]]:
    model, schedule = make(OVER_TWO, NODE)
    held = []
    for boundary in (False, True, False, None):
        if boundary is None:
            schedule.window.abandon()
        else:
            micro_step(model, schedule, boundary=boundary)
        held.append((nbytes(schedule.cache.tensors()), nbytes(schedule.window.tensors())))
    return held


def test_rank_caches_and_gradients_take_the_memory_of_the_model_and_none_after_the_boundary(
    over_two: Runs,
) -> None:
    for held in over_two["memory of ranks"]:
        assert held == [(MODEL_BYTES, MODEL_BYTES), (0, 0)]


def held_on_ranks() -> list[tuple[int, int]]:
    model, schedule = make(OVER_TWO, RANK)
    held = []
    for boundary in (False, True):
        micro_step(model, schedule, boundary=boundary)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())  # shards are what users see
        units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        groups = [group for unit in units for group in _param_groups(unit)]
        parameters = [parameter for group in groups for parameter in group.fsdp_params]
        stored = sum(t.untyped_storage().size() for parameter in parameters for t in parameter.all_gather_outputs)
        held.append((stored, nbytes([own_grad.__get__(parameter._unsharded_param) for parameter in parameters])))
    return held


def nbytes(tensors: list[torch.Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class TakesTurns(nn.Module):
    """Two blocks, of which a micro-step uses one, and a root without parameters in use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        return self.layers[turn](x).square().mean()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduce_dtype", REDUCE_DTYPES, ids=str)
def test_a_block_with_pending_gradients_is_reduced_at_a_boundary_that_does_not_use_it(
    level: str, reduce_dtype: torch.dtype | None, over_two: Runs
) -> None:
    for ours, alone in over_two["skipped", level, reduce_dtype]:
        assert alone.norm() > 1e-3
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-9)


def skip_at_the_boundary(
    options: CommunicationOptions, reduce_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, alone = TakesTurns(), TakesTurns()
    alone.load_state_dict(model.state_dict())
    groups = create_partition_groups(OVER_TWO, device_type="cpu")
    mixed_precision = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    schedule = shard_model(model, groups, communication=options, mixed_precision=mixed_precision)
    x = torch.randn(2, DIM)  # the same on all ranks
    for turn, boundary in ((0, False), (1, True)):
        with schedule.micro_step(boundary=boundary):
            model(x, turn).backward()
        alone(x, turn).backward()
    return model.layers[0].weight.grad.full_tensor(), alone.layers[0].weight.grad


WIRE_SHAPES = [(4, 2, 1), (4, 2, 2), (4, 2, 4), (4, 1, 2)]


MORE_WIRE_SHAPES = [(8, 2, 2), (8, 2, 4)]  # replicas of the first with groups of the others


WIRE_OPTIONS = {
    "every micro-step": CommunicationOptions.PAPER,
    "gradients once per step": CommunicationOptions(accumulate_gradients="node"),
    "cached by ranks": RANK,
}


@pytest.fixture(scope="module")
def wire(in_campaign: bool) -> Runs:
    """By shape and options, the errors and bytes that each rank has counted."""
    seen: Runs = {}
    for world_size in (4, 8):
        shapes = WIRE_SHAPES + MORE_WIRE_SHAPES if in_campaign else WIRE_SHAPES
        cases = [case for case in product(shapes, WIRE_OPTIONS) if case[0][0] == world_size]
        seen |= run_cases(world_size, {(s, name): partial(send_in_dtypes, s, WIRE_OPTIONS[name]) for s, name in cases})
    return seen


@pytest.mark.parametrize("shape", [*WIRE_SHAPES, *map(campaign, MORE_WIRE_SHAPES)], ids=str)
@pytest.mark.parametrize("options", WIRE_OPTIONS)
def test_bf16_messages_cost_their_rounding_and_sums_stay_in_float32(
    shape: tuple[int, int, int], options: str, wire: Runs
) -> None:
    for errors, halves, equal in wire[shape, options]:
        assert errors["float32"] < 1e-6  # the same sums, another way
        assert 1e-5 < errors["bfloat16"] < 2**-8  # rounded once per leg: half a unit in the last place of 8 bits
        assert halves
        assert equal


def send_in_dtypes(shape: tuple[int, int, int], options: CommunicationOptions) -> tuple[dict[str, float], bool, bool]:
    """Relative errors of gradients by wire dtype; whether bf16 halves their bytes; whether replicas are bit-equal."""
    world_size, ranks_per_node, partition_size = shape
    topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size)
    gradients, crossing = {}, {}
    for name, dtype in {"none": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        model, schedule = make(topology, replace(options, inter_node_reduce_dtype=dtype))
        torch.manual_seed(7 + torch.distributed.get_rank())
        for boundary in (False, True):
            micro_step(model, schedule, boundary=boundary)
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


def test_comparisons_inside_and_outside_of_inference_mode_are_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    monkeypatch.setattr(streams, "WITHOUT_STREAMS", frozenset())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor))
    cache, own = ParameterCache(tuple), torch.ones(4)
    with torch.inference_mode():
        cache.compare([(own, torch.zeros(4))])
    cache.compare([(own, own)])
    differs = cache.take_differs()
    assert differs is not None and bool(differs)
    assert len(kept) == 2 and kept[1] is differs  # what was dropped, and what is read on another stream
    assert cache.take_differs() is None
