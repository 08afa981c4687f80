"""Sharded training gives the numbers of one process that sees the complete batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.sharding.ranks.replicas import verify_replicas
from lightning_mics.techniques.partition_groups import PartitionGroups
from tests.support.campaign import campaign
from tests.support.forked import run_cases, run_ranks
from tests.support.groups import groups_for
from tests.support.models import Block, TinyLM, tokens

SHAPES = [
    *[(2, 1, 2), (4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 2, 4)],
    campaign(8, 2, 4, id="8-2-4 in all ways"),
    *[campaign(4, 4, 4), campaign(8, 4, 8), campaign(8, 2, 8), campaign(8, 2, 2)],  # more of what others have
]


MICRO_STEPS = (1, 3)


IN_CAMPAIGN = (1, 3, 4)


STEPS = 2


MAX_NORM = 0.05


class Fork(nn.Module):
    """A block whose parameters take turns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.left = nn.Linear(dim, dim)
        self.right = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, turn: int) -> Tensor:
        return hidden + (self.left if turn % 2 else self.right)(hidden)


class HardCases(TinyLM):
    """Tied and frozen parameters, a block used twice, one used in some micro-steps, one whose halves take turns."""

    def __init__(self) -> None:
        super().__init__(dim=7, layers=1)
        self.sometimes = Block(7)
        self.fork = Fork(7)
        self.frozen = Block(7).requires_grad_(False)
        self.fork.left.bias.requires_grad_(False)

    def forward(self, tokens: Tensor, turn: int) -> Tensor:
        hidden = self.blocks[0](self.blocks[0](self.embed(tokens)))
        if turn == 0:
            hidden = self.sometimes(hidden)
        hidden = self.frozen(self.fork(hidden, turn))
        logits = self.head(self.norm(hidden))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


BLOCKS = [Block, Fork]


FLAT = CommunicationOptions(hierarchical=False)


FLAT_CACHED = CommunicationOptions(hierarchical=False, cache_parameters="node")


PAPER, NODE, RANK = CommunicationOptions.PAPER, CommunicationOptions.NODE, CommunicationOptions.RANK


@pytest.mark.parametrize(("world", "ranks_per_node", "partition"), SHAPES)
def test_gradients_weights_and_clipping_are_those_of_one_process(world, ranks_per_node, partition, in_campaign):
    topology = Topology(world_size=world, ranks_per_node=ranks_per_node, partition_size=partition)
    modes = [FLAT, FLAT_CACHED, PAPER, NODE, RANK] if topology.spans_nodes else [FLAT, RANK]
    if partition == 8 or (world == 8 and not in_campaign):  # takes long; four ranks have the other modes, and replicas
        modes = [PAPER, NODE]
    windows = IN_CAMPAIGN if in_campaign else MICRO_STEPS if world < 8 else MICRO_STEPS[-1:]
    of_ranks = run_ranks(world, _train_beside_reference, topology, modes, windows)
    assert len(of_ranks[0]) == len(modes) * len(windows)
    for facts in zip(*of_ranks, strict=True):
        replica = facts[:partition]
        for step in range(STEPS):
            assert math.hypot(*(fact["gradient_errors"][step] for fact in replica)) < 1e-6, facts[0]
        assert math.hypot(*(fact["weight_error"] for fact in replica)) < 1e-6, facts[0]
        assert max(fact["norm_error"] for fact in facts) < 1e-6, facts[0]
        assert facts[0]["gradient_norm"] > 2 * MAX_NORM  # the clip clipped
        assert facts[0]["moved"] > 1e-3  # the weights moved
        assert facts[0]["sometimes_gradient"] > 1e-4  # a block that no boundary used got its gradient


ONE_OF_THEM = {
    "parameters": CommunicationOptions(cache_parameters="node"),
    "gradients": CommunicationOptions(accumulate_gradients="node"),
}


@pytest.fixture(scope="module", params=[4, campaign(8)])  # ranks: without replicas, or with them
def with_one_of_them(request):
    world = request.param
    topology = Topology(world_size=world, ranks_per_node=2, partition_size=4)
    train = partial(_train_beside_reference, topology)
    return run_cases(world, {once: partial(train, [mode], MICRO_STEPS[-1:]) for once, mode in ONE_OF_THEM.items()})


@pytest.mark.parametrize("once", ONE_OF_THEM)
def test_caching_and_accumulating_work_without_each_other(with_one_of_them, once):
    for facts in zip(*with_one_of_them[once], strict=True):
        assert max(error for fact in facts for error in fact["gradient_errors"]) < 1e-6, facts[0]
        assert max(fact["weight_error"] for fact in facts) < 1e-6, facts[0]
        assert facts[0]["moved"] > 1e-3


def _train_beside_reference(
    topology: Topology, modes: list[CommunicationOptions], windows: tuple[int, ...]
) -> list[dict[str, Any]]:
    facts = []
    for mode in modes:
        groups = groups_for(topology, mode)
        facts += [_compare(groups, mode, micro_steps) for micro_steps in windows]
    return facts


def _compare(groups: PartitionGroups, options: CommunicationOptions, micro_steps: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # each rank starts from weights of its own
    model = HardCases()
    reference = copy.deepcopy(model)
    schedule = shard_model(model, groups, communication=options, block_classes=BLOCKS)
    for name, parameter in model.named_parameters():
        reference.get_parameter(name).data.copy_(parameter.full_tensor())
    initial = _vector(reference.named_parameters())
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, reference))
    fact: dict[str, Any] = {"options": options, "s": micro_steps, "gradient_errors": [], "norm_error": 0.0}
    for step in range(STEPS):
        batch = tokens(micro_steps * world, seed=step).view(micro_steps, world, -1)  # [micro-step, rank, seq]
        for i in range(micro_steps):
            turn = i if micro_steps > 1 else step
            with schedule.micro_step(boundary=i == micro_steps - 1):
                (model(batch[i, rank : rank + 1], turn) / micro_steps).backward()
            (reference(batch[i], turn) / micro_steps).backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        fact["gradient_errors"].append(_error_of_shard(ours, theirs))
        fact["gradient_norm"] = float(_vector(theirs.items()).norm())
        if "sometimes.up.weight" in theirs:
            fact["sometimes_gradient"] = float(theirs["sometimes.up.weight"].norm())
        norms = [nn.utils.clip_grad_norm_(m.parameters(), MAX_NORM) for m in (model, reference)]
        fact["norm_error"] = max(fact["norm_error"], float(abs(norms[0].full_tensor() / norms[1] - 1)))
        for opt in (optimizer, plain):
            opt.step()
            opt.zero_grad()
        verify_replicas(model, groups)
    fact["weight_error"] = _error_of_shard(dict(model.named_parameters()), dict(reference.named_parameters()))
    fact["moved"] = float((_vector(reference.named_parameters()) - initial).norm())
    return fact


def _error_of_shard(ours: dict[str, DTensor], theirs: dict[str, Tensor]) -> float:
    """This rank's share of the relative error: the norm of its shards' errors over the norm of the unsharded vector."""
    errors = []
    for name, sharded in ours.items():
        whole = theirs.get(name, torch.zeros(sharded.shape))  # zeros where one process has no gradient
        errors.append((sharded.detach().to_local() - _shard_of(whole, sharded)).norm())
    assert theirs.keys() <= ours.keys()
    return float(torch.stack(errors).norm() / _vector(theirs.items()).norm())


def _shard_of(whole: Tensor, sharded: DTensor) -> Tensor:
    """The part of ``whole`` that this rank holds of ``sharded``, without communication."""
    mesh = sharded.device_mesh
    chunks = whole.detach().chunk(mesh["shard"].size())
    position = mesh.get_local_rank("shard")
    return chunks[position] if position < len(chunks) else whole[:0]


def _vector(named: Iterable[tuple[str, Tensor]]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for _, tensor in sorted(named)])


@pytest.mark.parametrize(("world", "partition"), [(4, 4), campaign(8, 4), campaign(8, 8)])
def test_hierarchical_and_flat_all_gather_are_bit_equal(world, partition):
    topology = Topology(world_size=world, ranks_per_node=2, partition_size=partition)
    for flat, hierarchical in run_ranks(world, _gather_both_ways, topology):
        assert flat.std() > 0.1
        assert torch.equal(flat, hierarchical)


def _gather_both_ways(topology: Topology) -> list[Tensor]:
    outputs = []
    for hierarchical in (False, True):
        groups = create_partition_groups(topology, device_type="cpu", hierarchical=hierarchical)
        torch.manual_seed(0)
        model = TinyLM()
        shard_model(model, groups)
        for module in model.modules():
            if hasattr(module, "unshard"):
                module.unshard()
        outputs.append(_vector(model.named_parameters()))
    return outputs


FIRST_WEIGHTS = [(1, 1, 1), (2, 1, 2), (4, 2, 2), (4, 2, 4)]


@pytest.fixture(scope="module")
def first_weights():
    """The last rank's by shape, whether they began on the meta device, and the seed of rank 0."""
    weights = {}
    for world in (1, 2, 4):
        shapes = [shape for shape in FIRST_WEIGHTS if shape[0] == world]
        seeds = (0, 5) if world == 1 else (0,)
        cases = product(shapes, (False, True), seeds)
        of_ranks = run_cases(world, {case: partial(_first_weights, *case) for case in cases})
        weights |= {case: each[-1] for case, each in of_ranks.items()}
    return weights


@pytest.mark.parametrize("on_meta", [False, True])
def test_the_initial_weights_depend_on_the_seed_of_rank_0_alone(first_weights, on_meta):
    weights = [first_weights[shape, on_meta, 0] for shape in FIRST_WEIGHTS]
    assert weights[0].isfinite().all()
    assert weights[0].std() > 0.01
    for other in weights[1:]:
        assert torch.equal(weights[0], other)
    assert not torch.equal(weights[0], first_weights[(1, 1, 1), on_meta, 5])


def _first_weights(shape: tuple[int, int, int], on_meta: bool, seed: int) -> Tensor:
    world, ranks_per_node, partition = shape
    torch.manual_seed(seed + dist.get_rank())
    with torch.device("meta" if on_meta else "cpu"):
        model = TinyLM()
    topology = Topology(world_size=world, ranks_per_node=ranks_per_node, partition_size=partition)
    shard_model(model, create_partition_groups(topology, device_type="cpu"))
    return _vector((name, parameter.full_tensor()) for name, parameter in model.named_parameters())
