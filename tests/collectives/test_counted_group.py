"""Groups that count their collectives: what they make of them, and what counting costs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_mics.collectives import counted_group
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Sent, SentShares, Traffic, part_of

RANKS = 4


class OneOfFour:
    """A process group in which all ranks have the values of this one."""

    def size(self) -> int:
        return RANKS

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nccl_never_multiplies_before_a_sum_in_bf16(dtype, monkeypatch):
    ops = []

    def reduce_scatter(output, source, *, group, op, async_op=False):
        ops.append(op)
        output.copy_(source.view(RANKS, -1)[0] * RANKS)  # what NCCL makes of a factor in bf16 is another matter

    monkeypatch.setattr(counted_group, "reduce_scatter_single", reduce_scatter)
    traffic = Traffic()
    group = CountedGroup(OneOfFour(), nodes=[0, 0, 1, 1], traffic=traffic, backend="nccl")
    output = torch.empty(3, dtype=dtype)
    source = torch.ones(RANKS * 3, dtype=dtype)
    group.reduce_scatter(output, source, op=dist._make_nccl_premul_sum(0.25), technique="reduce")
    if dtype == torch.bfloat16:
        assert ops == [dist.ReduceOp.SUM]
        assert output.tolist() == [1.0] * 3
    else:
        assert ops == [dist.ReduceOp.PREMUL_SUM]
    assert traffic.by_technique()["reduce"] == Sent(source.nbytes * 3 / 8, source.nbytes * 3 / 8)


class NodesThatCount(list):
    reads = 0

    def __getitem__(self, index):
        NodesThatCount.reads += 1
        return super().__getitem__(index)


def test_counting_a_collective_takes_no_longer_in_a_larger_group():
    shares = SentShares(NodesThatCount([0, 0, 1, 1]), position=0)
    reads = NodesThatCount.reads
    assert reads > 0
    assert shares.sent("all_gather", 80) == Sent(30, 30)
    assert shares.sent("all_to_all", 90) == Sent(pytest.approx(22.5), pytest.approx(45))
    assert NodesThatCount.reads == reads


@pytest.mark.parametrize("elements", [1, 7, 3 * 1000 + 1, 3 * 1024 + 1, 1_000_003])
def test_large_parts_of_messages_by_pairs_are_aligned_and_small_ones_are_exact(elements):
    part = part_of(elements, 3)
    exact = -(-elements // 3)
    assert exact <= part < 1.01 * exact + 1e-9
    assert part * 2 % 16 == 0 or part == exact < 1024


def test_an_all_reduce_by_pairs_gives_every_element_its_sum(monkeypatch):
    messages = []

    def exchange(parts, source, *, group):
        messages.append(source.numel())
        parts.copy_(source.view(RANKS, -1)[:1].expand(RANKS, -1).reshape(-1))  # this rank sums the first part

    def gather(output, shard, *, group, async_op):
        output.view(RANKS, -1)[0].copy_(shard)

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    monkeypatch.setattr(counted_group, "all_gather_single", gather)
    group = CountedGroup(OneOfFour(), nodes=[0, 0, 1, 1], traffic=Traffic(), backend="nccl")
    tensor = torch.arange(RANKS * 1024 + 1, dtype=torch.float32)
    group.all_reduce(tensor, op=dist.ReduceOp.SUM, technique="reduce", wire_dtype=torch.float32)
    assert messages == [RANKS * 1032]
    whole = torch.arange(RANKS * 1024 + 1, dtype=torch.float32)
    assert torch.equal(tensor, torch.where(whole < 1032, RANKS * whole, whole))
