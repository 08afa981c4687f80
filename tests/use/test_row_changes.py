"""Rows of sharded weights and gradients that users change, and changes with unsharded operands, take effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from tests.use.teachers import DIM, Block, Net, unsharded

ROW_2 = (torch.arange(DIM)[:, None] == 2).float()  # [DIM, 1]


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "w[2].zero_": lambda w: w[2].zero_(),
    "w[-1].fill_": lambda w: w[-1].fill_(7.0),
    "w[0:2].mul_": lambda w: w[0:2].mul_(2.0),
    "w[1:4][1].add_": lambda w: w[1:4][1].add_(1.0),
    "w[::2].neg_": lambda w: w[::2].neg_(),
    "two rows, one after the other": lambda w: [row.mul_(3.0) for row in (w[0], w[4])],
    "rows in a loop": lambda w: [row.add_(float(i)) for i, row in enumerate(w)],
    "a row taken before another change": lambda w: [(row := w[1]), w.mul_(2.0), row.add_(1.0)],
    "w.data[2].zero_": lambda w: w.data[2].zero_(),
    "w.data[2] = x": lambda w: w.data.__setitem__(2, _ones(DIM)),
    "w.detach()[2] = x": lambda w: w.detach().__setitem__(2, _ones(DIM)),
    "w[2] = 0": lambda w: w.__setitem__(2, 0.0),
    "w[2] += 1": lambda w: w.__setitem__(2, w[2] + 1),
    "w[2, 1] = 5": lambda w: w.__setitem__((2, 1), 5.0),
    "w[2] = ones": lambda w: w.__setitem__(2, _ones(DIM)),
    "w[[0, 2]] = 0": lambda w: w.__setitem__([0, 2], 0.0),
    "w[rows] = x": lambda w: w.__setitem__(torch.tensor([0, 3]), _ones(2, DIM)),
    "w[mask] = 0": lambda w: w.__setitem__(w.abs() < 0.2, 0.0),
    "w[unsharded mask] = 0": lambda w: w.__setitem__(unsharded(w).abs() < 0.2, 0.0),
    "w[:, 0] = 0": lambda w: w.__setitem__((slice(None), 0), 0.0),
    "w[:, 0].zero_": lambda w: w[:, 0].zero_(),
    "select": lambda w: w.select(0, 2).zero_(),
    "narrow": lambda w: w.narrow(0, 1, 2).mul_(3.0),
    "chunk": lambda w: w.chunk(3)[1].zero_(),
    "split": lambda w: w.split([1, 4])[1].zero_(),
    "torch.split": lambda w: torch.split(w, 2)[0].zero_(),
    "unbind": lambda w: w.unbind(0)[2].zero_(),
    "diagonal": lambda w: w.diagonal().fill_(1.0),
    "fill_diagonal_": lambda w: w.fill_diagonal_(1.0),
    "view": lambda w: w.view(-1)[3:9].zero_(),
    "flatten": lambda w: w.flatten().mul_(2.0),
    "transposed": lambda w: w.t()[:, 2].zero_(),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([2]), 0.0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([2]), _ones(1, DIM)),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([2]), _ones(1, DIM)),
    "scatter_": lambda w: w.scatter_(0, torch.zeros(1, DIM, dtype=torch.long), 1.0),
    "masked_fill_": lambda w: w.masked_fill_(unsharded(w) < 0, 0.0),
    "copy_": lambda w: w.copy_(_ones(DIM, DIM)),
    "mul_ by a mask": lambda w: w.mul_(1 - ROW_2),
    "*= mask": lambda w: w.__imul__(1 - ROW_2),
    "data = data * mask": lambda w: setattr(w, "data", w.data * (1 - ROW_2)),
    "data = mask * data": lambda w: setattr(w, "data", (1 - ROW_2) * w.data),
    "addmm_": lambda w: w.addmm_(_ones(DIM, 2), _ones(2, DIM)),
    "renormalized rows": lambda w: w.div_(w.norm(dim=1, keepdim=True)),
    "nn.init of a row": lambda w: nn.init.constant_(w[3], 0.5),
    "nn.init.eye_": lambda w: nn.init.eye_(w),
    "where": lambda w: w.copy_(torch.where(w > 0, w, torch.zeros_like(w))),
}


@pytest.fixture(scope="module", params=[2, 4])
def changed(request: pytest.FixtureRequest, run_shared: Callable[..., list[Any]]) -> list[dict[str, Tensor]]:
    return run_shared(4, _change_by_every_way, request.param)


def _change_by_every_way(partition_size: int) -> dict[str, Tensor | str]:
    net = _net()
    groups = create_partition_groups(
        Topology(world_size=4, ranks_per_node=2, partition_size=partition_size), device_type="cpu"
    )
    shard_model(net, groups, communication=CommunicationOptions.RANK, block_classes=[Block])
    start = {name: unsharded(p) for name, p in net.named_parameters()}
    results: dict[str, Tensor | str] = {}
    for way, change in WAYS.items():
        for name, parameter in net.named_parameters():
            with torch.no_grad():
                parameter.copy_(start[name])
        weight = net.block.inner.weight
        with torch.no_grad():
            change(weight)
        net.first.weight.grad = start_gradient = net.first.weight.detach().clone()
        change(start_gradient)
        x = torch.ones(2, DIM)
        with torch.no_grad():
            results[f"{way}, used"] = net(x)
        net.reshard()
        results[way] = unsharded(weight)
        results[f"{way}, of a gradient"] = unsharded(net.first.weight.grad)
    return results


def _net() -> Net:
    torch.manual_seed(1)
    return Net()


@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_rows_is_that_of_one_process(way: str, changed: list[dict[str, Tensor]]) -> None:
    net = _net()
    before, gradient = net.block.inner.weight.detach().clone(), net.first.weight.detach().clone()
    with torch.no_grad():
        WAYS[way](net.block.inner.weight)
        WAYS[way](gradient)
        used = net(torch.ones(2, DIM))
    assert not torch.equal(net.block.inner.weight, before)
    for of_rank in changed:
        torch.testing.assert_close(of_rank[way], net.block.inner.weight.detach())
        torch.testing.assert_close(of_rank[f"{way}, of a gradient"], gradient)
        torch.testing.assert_close(of_rank[f"{way}, used"], used)


def test_a_sharded_weight_with_unsharded_inputs_is_whole(run_shared: Any) -> None:
    for results in run_shared(3, _use_without_calling):
        for result, expected in results:
            torch.testing.assert_close(result, expected)


def _use_without_calling() -> list[tuple[Tensor, Tensor]]:
    """What operations return for a sharded weight or bias, and for the same values unsharded."""
    net = _sharded_net()
    inner = net.block.inner
    x = torch.ones(3, DIM)
    return [
        (use(weight, bias).detach(), use(unsharded(weight), unsharded(bias)).detach())
        for weight, bias in [(inner.weight, inner.bias)]
        for use in (
            lambda weight, bias: nn.functional.linear(x, weight),
            lambda weight, bias: nn.functional.linear(x, weight, bias),
            lambda weight, bias: x * weight[0],
            lambda weight, bias: x * bias,
        )
    ]


ARITHMETIC: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(0.5),
    "add_ with alpha": lambda w: w.add_(2, alpha=3),
    "add_ of another": lambda w: w.add_(w * w, alpha=0.5),
    "sub_ of a scalar tensor": lambda w: w.sub_(torch.tensor(0.25, dtype=torch.float64)),
    "div_ of a sum": lambda w: w.div_(w.sum().item()),
    "reflected": lambda w: 1 - w,
    "int to float": lambda w: (w * 8).int() / 2,
    "bool to int": lambda w: (w > 0) + 1,
    "half": lambda w: w.bfloat16() * 1.5,
    "transposed": lambda w: w.t() * 2 + w.t(),
    "of sharded and replicated": lambda w: w * w.sum(0, keepdim=True),
    "of different shards": lambda w: w * w.t(),
    "of a row": lambda w: w * w[0],
    "equal": lambda w: torch.tensor([torch.equal(w, unsharded(w)), torch.equal(unsharded(w) + 1, w)]),
    "lerp": lambda w: torch.lerp(unsharded(w) * 2, w, 0.3),
    "in inference mode": lambda w: _in_inference_mode(w),
}


def _in_inference_mode(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        return (weight * 2).mul_(3).add_(1)


def test_arithmetic_of_sharded_tensors_is_that_of_unsharded_ones(run_shared: Any) -> None:
    for of_rank in run_shared(3, _arithmetic):
        for way, (result, expected, ours, alone) in of_rank.items():
            torch.testing.assert_close(result, expected, msg=lambda text, way=way: f"{way}: {text}")
            assert result.dtype == expected.dtype and ours == alone, way


def _arithmetic() -> dict[str, Any]:
    net = _sharded_net()
    results = {}  # values, and versions and strides
    for way, use in ARITHMETIC.items():
        ours, alone = net.block.inner.weight.detach().clone(), unsharded(net.block.inner.weight).detach().clone()
        result, expected = use(ours), use(alone)
        results[way] = (
            unsharded(result).clone(),
            expected.clone(),
            (ours._version, result.stride()),
            (alone._version, expected.stride()),
        )
    return results


def _sharded_net() -> Net:
    net = _net()
    ranks = torch.distributed.get_world_size()
    topology = Topology(world_size=ranks, ranks_per_node=ranks, partition_size=ranks)
    shard_model(net, create_partition_groups(topology, device_type="cpu"), block_classes=[Block])
    return net
