from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.comparison.ring_reduce_scatter import RingReduceScatter
from tests.support.forked import run_ranks


def reduce_round_the_ring() -> tuple[torch.Tensor, torch.Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source = torch.arange(ranks * 2, dtype=torch.float32) + 10 * rank  # [ranks * shard]
    ring, total, mean = RingReduceScatter(), torch.empty(2), torch.empty(2)
    group = dist.group.WORLD
    assert group is not None
    ring(total, source, group, dist.ReduceOp.SUM)
    ring(mean, source, group, dist.ReduceOp.AVG)
    with pytest.raises(ValueError, match="the ring takes SUM and AVG"):
        ring(total, source, group, dist.ReduceOp.MAX)
    return total, mean


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ring_leaves_each_rank_with_the_sum_or_mean_of_its_shard(ranks: int) -> None:
    for rank, (total, mean) in enumerate(run_ranks(ranks, reduce_round_the_ring)):
        expected = sum(torch.arange(ranks * 2.0)[2 * rank : 2 * rank + 2] + 10 * other for other in range(ranks))
        assert torch.equal(total, expected)
        assert torch.allclose(mean, expected / ranks)
