"""Same bits: several ranks on one device over gloo give the gradients and weights of one process and of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.gpu.findings import Findings, last_line
from benchmarks.gpu.models import Stack
from benchmarks.gpu.ranks import run_ranks
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.sharding.shard_model import mixed_precision_policy

WIDTH, SAMPLES, STEPS, MICRO_STEPS = 33, 4, 2, 2
CLIP = 0.05  # norm of all gradients
SLEEP = 2_000_000  # cycles: about a millisecond
ROUNDING, ROUNDING_BF16 = 2e-5, 5e-2  # of the largest value
NODE, RANK, BF16 = CommunicationOptions.NODE, CommunicationOptions.RANK, torch.bfloat16
OPTION_SETS: dict[str, dict[str, Any]] = {  # options of CommunicationOptions, the precision, and what is on the host
    "flat": {"hierarchical": False},
    "flat, node cache": {"hierarchical": False, "cache_parameters": "node"},
    "two stages": {},
    "node cache": {"cache_parameters": "node"},
    "node cache and sums": {"cache_parameters": "node", "accumulate_gradients": "node"},
    "cache_offload, node cache": {"cache_parameters": "node", "cache_offload": True},
    "cache_offload, node cache and sums": {
        "cache_parameters": "node", "accumulate_gradients": "node", "cache_offload": True,
    },
    "bf16-mixed, cache_offload, node cache and sums": {
        "cache_parameters": "node", "accumulate_gradients": "node", "cache_offload": True, "precision": "bf16-mixed",
    },
    "rank cache": {"cache_parameters": "rank"},
    "rank cache and sums": {"cache_parameters": "rank", "accumulate_gradients": "rank"},
    "two_hop=False": {"two_hop": False},
    "bf16 between nodes": {"inter_node_reduce_dtype": BF16},
    "bf16 between nodes, node sums": {"accumulate_gradients": "node", "inter_node_reduce_dtype": BF16},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, node cache and sums": {
        "cache_parameters": "node", "accumulate_gradients": "node", "precision": "bf16-mixed",
    },
    "offload=True": {"offload": True},
    "offload=True, rank cache": {"offload": True, "cache_parameters": "rank"},
    "offload=True, node cache and sums": {
        "offload": True, "cache_parameters": "node", "accumulate_gradients": "node",
    },
    'offload="optimizer"': {"offload": "optimizer"},
}  # fmt: skip
SMALL_SETS = [  # on CPUs
    "two stages", "node cache and sums", "cache_offload, node cache and sums", "rank cache", "bf16 between nodes",
    "bf16-mixed", "offload=True", 'offload="optimizer"',
]  # fmt: skip
LAYOUTS = [(2, 1, 2), (2, 2, 2), (4, 2, 4), (4, 2, 2), (8, 4, 8), (8, 4, 4)]  # ranks, ranks per node, partition size


def run(findings: Findings) -> None:
    """Run the part."""
    small = findings.device == "cpu"
    names = SMALL_SETS if small else list(OPTION_SETS)
    for world in (4,) if small else (2, 4, 8):
        with findings.attempt(f"{world} ranks"):
            layouts = [layout for layout in LAYOUTS if layout[0] == world]
            of_ranks = run_ranks(
                world, compare, layouts[:1] if small else layouts, names, findings.device, device=findings.device
            )
            for what in of_ranks[0]:
                _report(findings, what, [found[what] for found in of_ranks])


def _report(findings: Findings, what: str, of_ranks: list[Any]) -> None:
    errors = [found for found in of_ranks if isinstance(found, str)]
    if errors:
        findings.add(what, errors[0], target="no error", holds=False)
        return
    worst, limit = max(gap for gap, _ in of_ranks), of_ranks[0][1]
    findings.add(what, f"{worst:.1e}", target=f"at most {limit:.0e} of the largest value", holds=worst <= limit)


def compare(layouts: list[tuple[int, int, int]], names: list[str], device: str) -> dict[str, Any]:
    """What each rank runs: sets of options on layouts; the largest gaps and their limits by name."""
    found: dict[str, Any] = dict(_collectives(device))
    alone = {precision: train_alone(precision) for precision in ("32-true", "bf16-mixed")}
    for world, ranks_per_node, partition_size in layouts:
        for name in names:
            options = OPTION_SETS[name]
            what = f"{world // ranks_per_node}x{ranks_per_node} ranks, partition groups of {partition_size}: {name}"
            topology = Topology(world_size=world, ranks_per_node=ranks_per_node, partition_size=partition_size)
            rounded = "precision" in options or "inter_node_reduce_dtype" in options
            limit = ROUNDING_BF16 if rounded else ROUNDING
            one_process = alone[options.get("precision", "32-true")]
            try:
                here = train(topology, options, device)
                found[f"{what}, against one process"] = gap(here, one_process), limit
                if device != "cpu":
                    found[f"{what}, against the CPU"] = gap(here, train(topology, options, "cpu")), limit
            except Exception as error:  # on all ranks alike, or the others time out
                found[f"{what}, against one process"] = last_line(error)
    return found


def train(topology: Topology, options: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Gradients and weights of a few steps on this rank's samples, unsharded, on the CPU."""
    options = dict(options)
    precision, offload = options.pop("precision", "32-true"), options.pop("offload", False)
    torch.manual_seed(0)
    model: Any = Stack(WIDTH)
    communication = CommunicationOptions(**options)
    groups = create_partition_groups(
        topology,
        device_type=device,
        hierarchical=communication.hierarchical,
        caches_on_nodes=communication.caches_on_nodes,
        serve_host=bool(offload),
    )
    schedule = shard_model(
        model, groups, communication=communication, offload=offload, mixed_precision=mixed_precision_policy(precision)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    with sleeping(model) if device == "cuda" else ExitStack():
        for step in range(STEPS):
            for micro_step in range(MICRO_STEPS):
                with schedule.micro_step(boundary=micro_step == MICRO_STEPS - 1):
                    batch = samples(step, micro_step, dist.get_rank()).to(device)
                    with torch.autocast(device, BF16, enabled=precision != "32-true"):
                        loss = model(batch)
                    (loss / MICRO_STEPS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)  # by norms of shards where they are
            found |= {f"{step} {name}.grad": _unsharded(p.grad) for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
    return found | {name: _unsharded(p) for name, p in model.named_parameters()}


def train_alone(precision: str) -> dict[str, Tensor]:
    """The same of one process on the CPU, with the samples of all ranks."""
    torch.manual_seed(0)
    model = Stack(WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            batch = torch.cat([samples(step, micro_step, rank) for rank in range(dist.get_world_size())])
            with torch.autocast("cpu", BF16, enabled=precision != "32-true"):
                loss = model(batch)
            (loss / MICRO_STEPS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        found |= {f"{step} {name}.grad": _unsharded(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: _unsharded(p) for name, p in model.named_parameters()}


def samples(step: int, micro_step: int, rank: int) -> Tensor:
    """The samples of one rank: [samples, width]."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + rank)
    return torch.randn(SAMPLES, WIDTH, generator=generator)


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two results, each as a share of the largest value of its kind."""

    def largest_of(gradients: bool) -> float:
        return max(float(value.abs().max()) for name, value in other.items() if name.endswith(".grad") is gradients)

    largest = {gradients: largest_of(gradients) for gradients in (True, False)}
    assert one.keys() == other.keys()
    assert min(largest.values()) > 0
    gaps = [float((one[n] - other[n]).abs().max()) / largest[n.endswith(".grad")] for n in other]
    return max(gaps) if all(value == value for value in gaps) else float("inf")


@contextmanager
def sleeping(model: Any) -> Iterator[None]:
    """Let the GPU sleep before and after each collective, on the stream it runs on, and before each block."""

    def slow(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda._sleep(SLEEP)
            result = original(*args, **kwargs)
            torch.cuda._sleep(SLEEP)
            return result

        return call

    handles = [block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP)) for block in model.blocks]
    with ExitStack() as patches:
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            patches.enter_context(patch.object(CountedGroup, name, slow(getattr(CountedGroup, name))))
        yield
    for handle in handles:
        handle.remove()


def _collectives(device: str) -> Iterator[tuple[str, Any]]:
    """Sums, averages and bfloat16 of the collectives themselves: gaps and limits by name."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, BF16):
        source = torch.arange(4 * world, device=device, dtype=torch.float32).add(rank).to(dtype)
        whole = sum(torch.arange(4 * world, dtype=torch.float32).add(other) for other in range(world))
        for op, divisor in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, world)):
            what = f"{world} ranks: gloo's reduce-scatter, {op}, {dtype}"
            try:
                shard = torch.empty(4, device=device, dtype=dtype)
                dist.reduce_scatter_tensor(shard, source.clone(), op=op)
                expected = whole[4 * rank : 4 * rank + 4] / divisor
                difference = float((shard.cpu().float() - expected).abs().max() / whole.max() * divisor)
                yield what, (difference, 1e-6 if dtype == torch.float32 else 2e-2)
            except Exception as error:
                yield what, last_line(error)


def _unsharded(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().float().cpu().clone()
