"""Which collectives run over which groups in which micro-step, and how many bytes they bring: counted on real runs."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_mics import AccumulationSchedule, CommunicationOptions, Topology, create_partition_groups, shard_model
from tests.support.campaign import campaign
from tests.support.forked import RankError
from tests.support.models import BLOCK_NUMEL, BYTES, DIM, LAYERS, MODEL_BYTES, Stack
from tests.support.recorded import Collective, RecordCollectives

SHAPES = [(4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 2, 4)]


MORE_SHAPES = [(8, 4, 8), (8, 2, 8)]  # more ranks on each node, or more nodes


def _record(topology: Topology, hierarchical: bool) -> list[list[Collective]]:
    """The collectives of three micro-steps, the last one the boundary."""
    model = Stack()
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu", hierarchical=hierarchical))
    steps = []
    for boundary in (False, False, True):
        with RecordCollectives() as recorded, schedule.micro_step(boundary=boundary):
            model(torch.randn(2, DIM)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters()) == (
            boundary or topology.replicas == 1
        )
        steps.append(recorded.seen)
    return steps


def ways(shapes: list[tuple[int, int, int]]) -> list[tuple[Topology, bool]]:
    topologies = [Topology(world_size=world, ranks_per_node=k, partition_size=p) for world, k, p in shapes]
    return [(topology, hierarchical) for topology in topologies for hierarchical in {False, topology.spans_nodes}]


@pytest.fixture(scope="module", params=[*ways(SHAPES), *map(campaign, ways(MORE_SHAPES))], ids=str)
def recorded(request, run_shared):
    topology, hierarchical = request.param
    return topology, hierarchical, run_shared(topology.world_size, _record, topology, hierarchical)


def test_every_micro_step_runs_the_designed_collectives_on_the_designed_groups(recorded):
    topology, hierarchical, of_ranks = recorded
    for rank, micro_steps in enumerate(of_ranks):
        partition, rail, node = (
            tuple(sorted(topology.partition_group(rank))),
            topology.rail(rank),
            topology.node_group(rank),
        )
        gathers, reductions = 2 * LAYERS + 1, LAYERS + 1  # the root stays gathered between forward and backward
        expected: Counter[tuple[str, tuple[int, ...]]] = Counter()
        if hierarchical:
            for group in (rail, node):
                expected["all_gather", group] += gathers
                expected["all_to_all", group] += reductions  # gloo's reduce-scatter
        elif topology.partition_size > 1:
            expected["all_gather", partition] += gathers
            expected[_flat_reduction(topology), partition] += reductions
        for index, seen in enumerate(micro_steps):
            if index == len(micro_steps) - 1 and topology.replicas > 1:
                expected["all_reduce", topology.replication_group(rank)] += reductions
            assert Counter((c.kind, c.ranks) for c in seen) == expected


def _flat_reduction(topology: Topology) -> str:
    """On gloo a group of several nodes with several ranks each uses gloo's own reduce-scatter, others go by pairs."""
    return "reduce_scatter" if topology.spans_nodes and topology.ranks_per_node > 1 else "all_to_all"


def test_bytes_are_those_of_the_paper(recorded):
    topology, hierarchical, of_ranks = recorded
    n, p = topology.world_size, topology.partition_size
    k = topology.local_ranks_per_partition_group
    gathered = MODEL_BYTES + LAYERS * BLOCK_NUMEL * BYTES  # forward all, backward all but the root
    for rank, micro_steps in enumerate(of_ranks):
        seen = micro_steps[-1]
        rail, node = topology.rail(rank), topology.node_group(rank)
        partition = tuple(sorted(topology.partition_group(rank)))
        if hierarchical:
            assert _received(seen, "all_gather", rail) == gathered * (p - k) // (p * k)
            assert _received(seen, "all_gather", node) == gathered * (k - 1) // k
            assert _received(seen, "all_to_all", node) == MODEL_BYTES * (k - 1) // k
            assert _received(seen, "all_to_all", rail) == MODEL_BYTES * (p - k) // (p * k)
        else:
            assert _received(seen, "all_gather", partition) == gathered * (p - 1) // p
            assert _received(seen, _flat_reduction(topology), partition) == MODEL_BYTES * (p - 1) // p
        assert _received(seen, "all_reduce", topology.replication_group(rank)) == 2 * MODEL_BYTES * (n - p) // (p * n)


def _received(seen: list[Collective], kind: str, ranks: tuple[int, ...]) -> int:
    return sum(c.received_bytes for c in seen if c.kind == kind and c.ranks == ranks)


def test_hierarchical_all_gather_brings_k_times_fewer_bytes_into_a_node_than_flat(run_shared):
    """Over two nodes of four ranks: flat, every rank receives the other node's half by itself."""
    topology = Topology(world_size=8, ranks_per_node=4, partition_size=8)
    k = topology.local_ranks_per_partition_group
    flat, staged = (run_shared(8, _record, topology, hierarchical)[0][0] for hierarchical in (False, True))
    foreign = sum(c.nbytes // 2 for c in flat if c.kind == "all_gather")  # a rank's share from the other node
    across = _received(staged, "all_gather", topology.rail(0))
    assert foreign == k * across > 0


def test_clipping_reduces_one_tensor_of_norms_over_the_partition_group(run_shared):
    for rank, seen in enumerate(run_shared(4, _record_clip)):
        assert [(c.kind, c.ranks) for c in seen] == [("all_reduce", (0, 1) if rank < 2 else (2, 3))]


def _record_clip() -> list[Collective]:
    model = Stack()
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=2)
    shard_model(model, create_partition_groups(topology, device_type="cpu"))
    model(torch.randn(2, DIM)).backward()
    with RecordCollectives() as recorded:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return recorded.seen


def test_sharding_costs_one_checksum_exchange_besides_the_initial_weights(run_shared):
    """A model on the meta device is initialized without sending any weight."""
    for seen in run_shared(4, _record_start):
        assert Counter(c.kind for c in seen) == {"broadcast": 1, "all_gather": 1, "all_reduce": 1}
        assert sum(c.nbytes for c in seen) < BLOCK_NUMEL * BYTES


def _record_start() -> list[Collective]:
    with torch.device("meta"):
        model = Stack()
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=2)
    groups = create_partition_groups(topology, device_type="cpu")
    with RecordCollectives() as recorded:
        shard_model(model, groups)
    return recorded.seen


IN_TWO_GROUPS = Topology(world_size=4, ranks_per_node=2, partition_size=2)


@pytest.mark.parametrize("wire_dtype", [None, torch.float32], ids=str)
def test_without_two_hops_replicas_reduce_in_every_micro_step_to_the_same_gradients(wire_dtype, run_shared):
    for two_hops, one_by_one in run_shared(4, _with_and_without_two_hops, wire_dtype):
        first, middle, boundary = two_hops["second hops"]
        assert (first, middle) == (0, 0)
        assert boundary >= LAYERS + 1
        assert one_by_one["second hops"] == [boundary] * 3
        assert two_hops["gradients"].norm() > 1e-3
        torch.testing.assert_close(two_hops["gradients"], one_by_one["gradients"], rtol=1e-5, atol=1e-8)


def _with_and_without_two_hops(wire_dtype: torch.dtype | None) -> list[dict]:
    facts = []
    replication_group = IN_TWO_GROUPS.replication_group(torch.distributed.get_rank())
    for two_hop in (True, False):
        torch.manual_seed(0)
        model = Stack()
        groups = create_partition_groups(IN_TWO_GROUPS, device_type="cpu")
        schedule = shard_model(
            model, groups, communication=CommunicationOptions(two_hop=two_hop, inter_node_reduce_dtype=wire_dtype)
        )
        torch.manual_seed(1 + torch.distributed.get_rank())
        second_hops = []
        for boundary in (False, False, True):
            with RecordCollectives() as recorded, schedule.micro_step(boundary=boundary):
                model(torch.randn(2, DIM)).backward()
            second_hops.append(sum(c.ranks == replication_group for c in recorded.seen))
        gradients = torch.cat([parameter.grad.to_local().flatten() for parameter in model.parameters()])
        facts.append({"second hops": second_hops, "gradients": gradients})
    return facts


def test_a_custom_loop_needs_three_methods():
    public = {name for name in vars(AccumulationSchedule) if not name.startswith("_")}
    assert public == {"micro_step", "cached_weights", "invalidate_cache"}


class WithBiases(Stack):
    """Two parameters in each block, of which one can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))

    def freeze_biases(self, frozen: bool) -> None:
        for layer in self.layers:
            layer.bias.requires_grad_(not frozen)


def test_parameters_can_be_frozen_for_one_backward_of_a_window(run_shared):
    for ours, alone in run_shared(4, _freeze_for_one_backward, True):
        assert all(gradient.norm() > 1e-3 for gradient in alone)
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-8)


def test_freezing_for_one_backward_needs_before_backward(run_shared):
    with pytest.raises(RankError):
        run_shared(4, _freeze_for_one_backward, False)


def _freeze_for_one_backward(prepared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = WithBiases()
    alone = deepcopy(model)
    schedule = shard_model(model, create_partition_groups(IN_TWO_GROUPS, device_type="cpu"))
    for frozen, boundary in ((True, False), (False, True)):
        batches = torch.randn(4, 2, DIM)  # [ranks, batch, DIM]
        model.freeze_biases(frozen)
        with schedule.micro_step(boundary=boundary):
            loss = model(batches[torch.distributed.get_rank()])
            if prepared:
                schedule.window.before_backward()
            loss.backward()
        alone.freeze_biases(frozen)
        (sum(alone(batch) for batch in batches) / 4).backward()
    return [p.grad.full_tensor() for p in model.parameters()], [p.grad for p in alone.parameters()]
