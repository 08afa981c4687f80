"""``torch.optim.Muon`` on a sharded model: one process's numbers, each matrix orthogonalized once, few bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.optim._muon as torch_muon
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.optimizers import in_float32
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics._torch.dtensors.owned_rows import OwnedRows
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.topology import partition_sizes
from tests.support.campaign import campaign
from tests.support.forked import run_cases
from tests.support.models import TinyLM, tokens

LAYERS, STEPS, LR = 3, 6, 0.02
NODE, PAPER = CommunicationOptions.NODE, CommunicationOptions.PAPER
ITERATION = torch_muon._zeropower_via_newtonschulz  # in bfloat16


ITERATIONS = {"bfloat16": ITERATION, "float32": in_float32}


def network() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(layers=LAYERS)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    of_blocks = matrices(model)
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in of_blocks)]
    return [torch.optim.Muon(of_blocks, lr=LR), torch.optim.AdamW(rest, lr=LR / 10, eps=1e-3)]


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            one, other = args[-2:]
            self.flops += 2 * one.size(0) * one.size(1) * other.size(1)
        return func(*args, **(kwargs or {}))


def batch(rank: int, step: int, micro_step: int) -> Tensor:
    return tokens(2, seed=1000 * step + 100 * micro_step + rank)


Changes = Callable[[nn.Module, int], None]


def clip(model: nn.Module, _step: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05, error_if_nonfinite=True)


def clip_values(model: nn.Module, _step: int) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.001)


def use(model: nn.Module, step: int) -> None:
    """What code between backward and step may do with gradients."""
    for parameter in model.parameters():
        if step % 2:
            parameter.grad.add_(parameter, alpha=0.1)
        else:
            parameter.grad = parameter.grad * 0.5


def leave_out(model: nn.Module, step: int) -> None:
    if step == 2:
        model.get_parameter("blocks.1.up.weight").grad = None


def train(
    size: int,
    options: CommunicationOptions,
    micro_steps: int,
    *,
    nodes: int = 2,
    change: Changes | None = None,
    steps: int = STEPS,
) -> dict[str, Any]:
    world_size = dist.get_world_size()
    topology = Topology(world_size=world_size, ranks_per_node=world_size // nodes, partition_size=size)
    model = network()
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)
    both = optimizers(model)
    schedule.optimizer_hooks.adopt(both[0])
    sent: list[dict[str, float]] = [{}]
    weights, flops, calls, left = [], [], [], []
    for step in range(steps):
        with exchanges() as count:
            for micro_step in range(micro_steps):
                with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                    (model(batch(dist.get_rank(), step, micro_step)) / micro_steps).backward()
            if change is not None:
                change(model, step)
            left.append(sum(isinstance(p.grad, OwnedRows) and p.grad.held is not None for p in model.parameters()))
            with Products() as products:
                for optimizer in both:
                    optimizer.step()
        for optimizer in both:
            optimizer.zero_grad()
        flops.append(products.flops)
        calls.append(count())
        sent.append({name: each.between_bytes for name, each in schedule.traffic.by_technique().items()})
        weights.append(whole(model) if step in (0, steps // 2, steps - 1) or steps == STEPS else {})
    momentum = [state["momentum_buffer"].held for state in both[0].state.values()]
    return {
        "weights": weights,
        "sent": [{k: v - before.get(k, 0) for k, v in after.items()} for before, after in pairwise(sent)],
        "flops": flops,
        "exchanges": calls,
        "gradients with owners": left,
        "momentum": sum(rows.numel() for rows in momentum if rows is not None),
    }


@contextmanager
def exchanges() -> Iterator[Callable[[], int]]:
    """Counts the exchanges with owners."""
    calls, original = [], CountedGroup.exchange

    def exchange(group: CountedGroup, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["technique"])
        return original(group, *args, **kwargs)

    CountedGroup.exchange = exchange
    try:
        yield lambda: len(calls)
    finally:
        CountedGroup.exchange = original


def alone(
    micro_steps: int,
    *,
    change: Changes | None = None,
    order: random.Random | None = None,
    steps: int = STEPS,
    ranks: int = 4,
) -> list[dict[str, Tensor]]:
    model = network()
    both, weights = optimizers(model), []
    for step in range(steps):
        batches = [batch(rank, step, micro_step) for micro_step in range(micro_steps) for rank in range(ranks)]
        if order is not None:
            order.shuffle(batches)
        for each in batches:
            (model(each) / micro_steps / ranks).backward()
        if change is not None:
            change(model, step)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    return weights


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


@contextmanager
def iteration(function: Callable[..., Tensor]) -> Any:
    torch_muon._zeropower_via_newtonschulz = function
    try:
        yield
    finally:
        torch_muon._zeropower_via_newtonschulz = ITERATION


def with_iteration(function: Callable[..., Tensor], case: Callable[[], Any]) -> Any:
    with iteration(function):
        return case()


def name_of(size: int, nodes: int, options: str, micro_steps: int, change: Changes | None = None) -> str:
    changed = f", {change.__name__}" if change else ""
    return f"{size} ranks on {nodes} nodes, {options}, {micro_steps} micro-steps{changed}"


Case = tuple[int, int, str, int, Changes | None]
OPTIONS = {
    "node": NODE,
    "paper": PAPER,
    "rank": CommunicationOptions.RANK,
    "node, on the host": replace(NODE, cache_offload=True),
}
ONCE: list[Case] = [(1, 2, "node", 1, None), (2, 2, "node", 4, None), (4, 2, "node", 1, None), (4, 2, "node", 4, None)]
CASES: dict[str, Case] = {
    name_of(*case): case
    for case in [
        *ONCE,
        (2, 2, "paper", 2, None),
        (4, 2, "paper", 2, None),
        (4, 2, "rank", 2, None),
        (1, 1, "node", 2, None),
        (2, 4, "node", 2, None),
        (4, 2, "node, on the host", 2, None),
        (2, 2, "node", 2, clip),
        (2, 2, "node", 2, use),
        *((4, 2, "node", 2, change) for change in (clip, clip_values, use, leave_out)),
    ]
}
IN_CAMPAIGN: dict[str, Case] = {
    name_of(*case): case
    for case in [
        (1, 2, "node", 4, None),
        (2, 2, "node", 1, None),
        (1, 2, "paper", 2, None),
        *((size, nodes, "node", 2, None) for nodes, size in ((1, 2), (1, 4), (4, 1), (4, 4))),
        *((1, 2, "node", 2, change) for change in (clip, clip_values, use, leave_out)),
        *((2, 2, "node", 2, change) for change in (clip_values, leave_out)),
    ]
}
ALL = CASES | IN_CAMPAIGN
LONG = [(2, 1), (4, 4)]
LONG_IN_CAMPAIGN = [(1, 1), (1, 4), (2, 4), (4, 1)]
LONG_STEPS = 50
OTHER_ORDERS = 4  # of sums in one process: a bfloat16 iteration spreads by chance


@pytest.fixture(scope="module")
def results(in_campaign: bool) -> Any:
    exact = {
        name: partial(with_iteration, in_float32, partial(train, size, OPTIONS[options], s, nodes=nodes, change=change))
        for name, (size, nodes, options, s, change) in (ALL if in_campaign else CASES).items()
    }
    long = {
        (size, s, dtype): partial(with_iteration, function, partial(train, size, NODE, s, steps=LONG_STEPS))
        for size, s in [*LONG, *(LONG_IN_CAMPAIGN if in_campaign else ())]
        for dtype, function in ITERATIONS.items()
    }
    return run_cases(4, {**exact, **long, "gradients": gradients, "groups": groups_and_frozen})


@pytest.fixture(scope="module")
def references() -> Any:
    with iteration(in_float32):
        kinds = {(micro_steps, change) for _, _, _, micro_steps, change in ALL.values()}
        return {kind: alone(kind[0], change=kind[1]) for kind in kinds}


@pytest.mark.parametrize("name", [*CASES, *map(campaign, IN_CAMPAIGN)])
def test_weights_are_those_of_one_process_on_all_ranks(name, results, references):
    *_, micro_steps, change = ALL[name]
    for step, reference in enumerate(references[micro_steps, change]):
        assert_same(results[name], step, reference, 5e-6)


@pytest.mark.parametrize(("size", "micro_steps"), [*LONG, *(campaign(*case) for case in LONG_IN_CAMPAIGN)])
def test_fifty_steps_end_where_one_process_does(size, micro_steps, results):
    ranks = results[size, micro_steps, "float32"]
    with iteration(in_float32):
        reference = alone(micro_steps, steps=LONG_STEPS)
    for step in (0, LONG_STEPS // 2, LONG_STEPS - 1):
        assert_same(ranks, step, reference[step], 5e-6)
    ranks = results[size, micro_steps, "bfloat16"]
    reference = alone(micro_steps, steps=LONG_STEPS)[-1]
    other_orders = [alone(micro_steps, steps=LONG_STEPS, order=random.Random(seed))[-1] for seed in range(OTHER_ORDERS)]
    allowed = 2 * max(gap(reference[name], other[name]) for other in other_orders for name in reference)
    assert_same(ranks, -1, reference, allowed)


@pytest.mark.parametrize("name", [*CASES, *map(campaign, IN_CAMPAIGN)])
def test_each_matrix_is_orthogonalized_once_in_the_job(name, results):
    with iteration(in_float32):
        once = flops_of_one_process()
    steps = zip(*(of_rank["flops"] for of_rank in results[name]), strict=True)
    expected = [sum(once)] * STEPS
    if ALL[name][-1] is leave_out:
        expected[2] -= once[2]
    assert list(map(sum, steps)) == expected
    elements = sum(p.numel() for p in matrices(network()))
    assert sum(of_rank["momentum"] for of_rank in results[name]) == elements


def flops_of_one_process() -> list[int]:
    """Floating-point operations of each matrix."""
    flops = []
    for matrix in matrices(network()):
        matrix.grad = torch.ones_like(matrix)
        with Products() as products:
            torch.optim.Muon([matrix]).step()
        flops.append(products.flops)
    return flops


@pytest.mark.parametrize("iterated", ["bfloat16", "float32"])
@pytest.mark.parametrize(("size", "micro_steps"), [*LONG, *(campaign(*case) for case in LONG_IN_CAMPAIGN)])
def test_matrices_cross_nodes_at_three_quarters_of_the_bytes_of_an_all_reduce(size, micro_steps, iterated, results):
    nodes, weights = 2, sum(p.nbytes for p in matrices(network()))
    all_reduce = nodes * 2 * weights * (nodes - 1) / nodes  # of the job
    steps = [of_rank["sent"][1:] for of_rank in results[size, micro_steps, iterated]]
    for of_ranks in zip(*steps, strict=True):
        owners = sum(sent for of_rank in of_ranks for name, sent in of_rank.items() if "owne" in name)
        assert owners / all_reduce == (0.75 if iterated == "bfloat16" else 1.0)
        rest = sum(p.nbytes for p in network().parameters()) - weights
        others = sum(sum(of_rank.values()) for of_rank in of_ranks) - owners
        assert others <= 1.6 * nodes * 2 * rest * (nodes - 1) / nodes  # padded to rows, and p < node in rings


@pytest.mark.parametrize("name", [name_of(*case) for case in ONCE])
def test_gradients_stay_with_owners_and_few_exchanges_are_made(name, results):
    for of_rank in results[name]:
        assert of_rank["gradients with owners"] == [2 * LAYERS] * STEPS
        assert max(of_rank["exchanges"]) <= 4 * LAYERS


@pytest.mark.parametrize("size", [campaign(1), 2, 4])
def test_clipping_leaves_gradients_with_owners_and_other_uses_move_them(size, results):
    for of_rank in results[name_of(size, 2, "node", 2, clip)]:
        assert of_rank["gradients with owners"] == [2 * LAYERS] * STEPS
    for of_rank in results[name_of(size, 2, "node", 2, use)]:
        assert of_rank["gradients with owners"] == [0] * STEPS


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name]


def assert_same(ranks: list[Any], step: int, reference: dict[str, Tensor], tolerance: float) -> None:
    for key, value in reference.items():
        torch.testing.assert_close(ranks[0]["weights"][step][key], value, rtol=0, atol=tolerance)
        assert all(torch.equal(of_rank["weights"][step][key], ranks[0]["weights"][step][key]) for of_rank in ranks)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.campaign
@pytest.mark.parametrize("nodes", [4, 2])
def test_eight_ranks_end_where_one_process_does(nodes):
    """Among them partition groups of two nodes, which are half of the job."""
    sizes = partition_sizes(world_size=8, ranks_per_node=8 // nodes)
    cases = {
        (size, s): partial(with_iteration, in_float32, partial(train, size, NODE, s, nodes=nodes, steps=LONG_STEPS))
        for size in sizes
        for s in ((1, 4) if size == 4 else (1,))
    }
    results = run_cases(8, cases, timeout=500)
    weights = sum(p.nbytes for p in matrices(network()))
    for (_, s), ranks in results.items():
        with iteration(in_float32):
            reference = alone(s, steps=LONG_STEPS, ranks=8)
        for step in (0, LONG_STEPS // 2, LONG_STEPS - 1):
            assert_same(ranks, step, reference[step], 5e-6)
        owners = sum(sent for of_rank in ranks for name, sent in of_rank["sent"][-1].items() if "owne" in name)
        assert owners == 2 * weights * (nodes - 1)  # in float32
        assert sum(of_rank["flops"][-1] for of_rank in ranks) == sum(of_rank["flops"][0] for of_rank in ranks)


# -- what code sees of gradients ---------------------------------------------------------------------------------------


def sharded(size: int = 4, options: CommunicationOptions = NODE) -> tuple[Any, Any]:
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=size)
    model = network()
    return model, shard_model(model, create_partition_groups(topology, device_type="cpu"), communication=options)


def backward(model: Any, schedule: Any) -> None:
    with schedule.micro_step(boundary=True):
        model(batch(dist.get_rank(), 0, 0)).backward()


def gradients() -> Any:
    """Of a matrix with an owner: what hooks see, its norm, text and values; and of two backwards without a step."""
    found = []
    for size in (1, 2, 4):
        model, schedule = sharded(size)
        schedule.optimizer_hooks.adopt(optimizers(model)[0])
        hooked, watched = model.get_parameter("blocks.0.up.weight"), model.get_parameter("blocks.1.up.weight")
        seen: list[Tensor] = []
        hooked.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.full_tensor().clone()))
        backward(model, schedule)
        gradient = watched.grad
        moved = [
            str(gradient),
            gradient.norm().item(),
            float(gradient.abs().max()),
            gradient.shape,
            gradient.held is None,
        ]
        backward(model, schedule)
        backward(model, schedule)
        total = model.get_parameter("blocks.2.down.weight").grad.full_tensor()
        found.append((seen[0], moved, watched.grad.full_tensor(), total))
    return found


def groups_and_frozen() -> Any:
    """Weights after three steps of a Muon with two groups, one added later, and a frozen matrix."""
    model, schedule = sharded()
    start(model, lambda: backward(model, schedule), schedule.optimizer_hooks.adopt)
    return whole(model)


def start(model: Any, run_backward: Callable[[], None], adopt: Callable[[Any], None] = lambda _: None) -> None:
    of_blocks = matrices(model)
    of_blocks[0].requires_grad_(False)
    slow = {"params": of_blocks[:2], "lr": torch.tensor(LR / 2), "nesterov": False, "weight_decay": 0.3}
    fast = {"params": of_blocks[2:4], "adjust_lr_fn": "match_rms_adamw", "momentum": 0.5}
    optimizer = torch.optim.Muon([slow, fast], lr=LR)
    adopt(optimizer)
    for step in range(3):
        run_backward()
        if step == 1:
            optimizer.add_param_group({"params": of_blocks[4:]})
            optimizer.param_groups[1]["lr"] = LR / 3
        optimizer.step()
        optimizer.zero_grad()


def test_code_sees_the_gradients_of_one_process(results):
    model = network()
    sum(model(batch(rank, 0, 0)) / 4 for rank in range(4)).backward()
    watched = model.get_parameter("blocks.1.up.weight").grad
    for of_rank in results["gradients"]:
        for seen, (text, norm, largest, shape, moved), accumulated, total in of_rank:
            torch.testing.assert_close(seen, model.get_parameter("blocks.0.up.weight").grad, rtol=0, atol=1e-6)
            assert "rows with their owner" in text
            assert norm == pytest.approx(float(watched.norm()))
            assert largest == pytest.approx(float(watched.abs().max()))
            assert shape == watched.shape
            assert moved  # abs() has
            torch.testing.assert_close(accumulated, 3 * watched, rtol=0, atol=1e-6)
            expected = model.get_parameter("blocks.2.down.weight").grad
            torch.testing.assert_close(total, 3 * expected, rtol=0, atol=1e-6)


def test_groups_have_their_own_options_and_frozen_matrices_stay(results):
    model = network()
    with iteration(ITERATION):
        start(model, lambda: sum(model(batch(rank, 0, 0)) / 4 for rank in range(4)).backward())
    for of_rank in results["groups"]:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(of_rank[name], value, rtol=0, atol=2e-3)
        assert torch.equal(of_rank["blocks.0.up.weight"], network().state_dict()["blocks.0.up.weight"])
