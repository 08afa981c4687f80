"""The two-stage collectives against the flat ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_mics import Topology, create_partition_groups
from lightning_mics._torch.process_groups import all_gather_single
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.techniques.partition_groups import PartitionGroups

SHARD = 5


SHAPES = [(4, 2, 4), (4, 1, 2), (8, 2, 8), (8, 4, 8), (8, 2, 4)]


OPS = {
    "sum": dist.ReduceOp.SUM,
    "average": dist.ReduceOp.AVG,
    "premultiplied sum": dist._make_nccl_premul_sum(0.25),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_two_stages_give_what_one_flat_collective_gives(shape, run_shared):
    for errors in run_shared(shape[0], _compare_with_flat, shape):
        assert errors.pop("all-gather") == 0
        assert errors.pop("all-gather, asynchronous") == 0
        assert errors.keys() == OPS.keys()
        for op, error in errors.items():
            assert error < 1e-6, op


def _compare_with_flat(shape: tuple[int, int, int]) -> dict[str, float]:
    world, ranks_per_node, partition = shape
    topology = Topology(world_size=world, ranks_per_node=ranks_per_node, partition_size=partition)
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=True)
    errors = {
        "all-gather": _all_gather_error(groups, async_op=False),
        "all-gather, asynchronous": _all_gather_error(groups, async_op=True),
    }
    for name, op in OPS.items():
        errors[name] = _reduce_scatter_error(groups, op)
    return errors


def _stages(groups: PartitionGroups) -> dict[str, CountedGroup | None]:
    """Rail and node; a node of one rank has no group."""

    def counted(group: dist.ProcessGroup | None) -> CountedGroup | None:
        if group is None:
            return None
        nodes = [groups.topology.node_of(rank) for rank in dist.get_process_group_ranks(group)]
        return CountedGroup(group, nodes=nodes, traffic=Traffic(), backend=groups.backend)

    return {"rail": counted(groups.rail), "node": counted(groups.node)}


def _all_gather_error(groups: PartitionGroups, *, async_op: bool) -> float:
    p, position = groups.partition.size(), groups.partition.rank()
    output = torch.full((p * SHARD,), torch.nan)
    mine = output[position * SHARD : (position + 1) * SHARD]
    mine.copy_(torch.arange(SHARD) + 100.0 * dist.get_rank())
    flat = torch.empty_like(output)
    all_gather_single(flat, mine.clone(), group=groups.partition)
    gather = HierarchicalAllGather(**_stages(groups))
    work = gather(output, mine, groups.partition, async_op=async_op)
    if work is not None:
        work.wait()
    assert flat.unique().numel() == flat.numel()
    return float((output - flat).abs().max())


def _reduce_scatter_error(groups: PartitionGroups, op: dist.ReduceOp) -> float:
    generator = torch.Generator().manual_seed(dist.get_rank())
    source = torch.randn(groups.partition.size() * SHARD, generator=generator)
    everyone = torch.empty(groups.partition.size() * source.numel())
    all_gather_single(everyone, source, group=groups.partition)
    factor = {dist.ReduceOp.SUM: 1.0, dist.ReduceOp.AVG: 1 / groups.partition.size()}.get(op, 0.25)
    expected = everyone.view(groups.partition.size(), -1).sum(0).chunk(groups.partition.size())[groups.partition.rank()]
    output = torch.full((SHARD,), torch.nan)
    reduce = HierarchicalReduceScatter(**_stages(groups))
    reduce(output, source, groups.partition, op)
    return float((output - factor * expected).abs().max())


def test_other_reductions_are_rejected(run_shared):
    assert run_shared(2, _reduce_by_maximum) == ["a reduce-scatter by pairs takes SUM, AVG and PREMUL_SUM"] * 2


def _reduce_by_maximum() -> str:
    groups = create_partition_groups(Topology(world_size=2, ranks_per_node=1, partition_size=2), device_type="cpu")
    reduce = HierarchicalReduceScatter(**_stages(groups))
    with pytest.raises(ValueError, match="SUM, AVG") as caught:
        reduce(torch.empty(1), torch.ones(2), groups.partition, dist.ReduceOp.MAX)
    return str(caught.value).partition(", got")[0]


def test_a_group_of_another_size_is_rejected(run_shared):
    for message in run_shared(2, _gather_for_another_group):
        assert message == "called for a group of 1 ranks, made for 2 nodes of 1"


def _gather_for_another_group() -> str:
    groups = create_partition_groups(Topology(world_size=2, ranks_per_node=1, partition_size=2), device_type="cpu")
    gather = HierarchicalAllGather(**_stages(groups))
    with pytest.raises(RuntimeError, match="called for") as caught:
        gather(torch.empty(1), torch.empty(1), dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return str(caught.value)
