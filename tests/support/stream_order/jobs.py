"""What runs under the simulation: option sets, and usages of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mics._torch.fake import rehearsed_job
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.sharding.shard_model import mixed_precision_policy, shard_model
from lightning_mics.topology import Topology
from tests.support.groups import groups_for
from tests.support.models import VOCAB, tokens
from tests.support.stream_order.simulation import Simulation, simulated_streams

NODE, RANK = CommunicationOptions.NODE, CommunicationOptions.RANK
WIRE = torch.bfloat16
OVER_NODES, ONE_NODE, ONE_RANK_A_NODE = (8, 2, 4), (4, 2, 2), (4, 1, 2)  # ranks, ranks per node, partition size

OPTIONS: dict[str, tuple[tuple[int, int, int], CommunicationOptions]] = {
    "inside a node": (ONE_NODE, CommunicationOptions()),
    "flat": (OVER_NODES, CommunicationOptions(hierarchical=False)),
    "flat, node cache": (OVER_NODES, CommunicationOptions(hierarchical=False, cache_parameters="node")),
    "two stages": (OVER_NODES, CommunicationOptions()),
    "node cache": (OVER_NODES, CommunicationOptions(cache_parameters="node")),
    "node cache and sums": (OVER_NODES, NODE),
    "rank cache": (OVER_NODES, CommunicationOptions(cache_parameters="rank")),
    "rank cache and sums": (OVER_NODES, RANK),
    "every micro-step": (OVER_NODES, CommunicationOptions(two_hop=False)),
    "one rank a node": (ONE_RANK_A_NODE, CommunicationOptions()),
    "one rank a node, node cache and sums": (ONE_RANK_A_NODE, NODE),
    "one partition group": ((4, 2, 4), NODE),
}
OPTIONS |= {
    f"{name}, wire dtype": (OPTIONS[name][0], replace(OPTIONS[name][1], inter_node_reduce_dtype=WIRE))
    for name in (
        "inside a node",
        "two stages",
        "node cache",
        "node cache and sums",
        "rank cache",
        "rank cache and sums",
        "one rank a node",
        "every micro-step",
    )
}

OPTIONS |= {
    f"{name}, one ahead": (OPTIONS[name][0], replace(OPTIONS[name][1], inter_node_prefetch=1))
    for name in ("two stages", "node cache and sums", "rank cache", "one rank a node")
}

OPTIONS |= {
    f"{name}, on the host": (OPTIONS[name][0], replace(OPTIONS[name][1], cache_offload=True))
    for name in (
        "node cache",
        "node cache and sums",
        "node cache and sums, wire dtype",
        "node cache and sums, one ahead",
        "one rank a node, node cache and sums",
    )
}

PRECISIONS = {"32-true": None, "bf16-mixed": None, "bf16-true": torch.float32}  # with the dtype of reductions


class Block(nn.Module):
    """A residual block of which no dimension divides by a number of ranks."""

    def __init__(self, dim: int, further_parameters: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim + 1)
        self.down = nn.Linear(2 * dim + 1, dim)
        self.scales = nn.ParameterList(torch.ones(dim) for _ in range(further_parameters))

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, seq, dim] -> same
        for scale in self.scales:
            hidden = hidden * scale
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Network(nn.Module):
    """A language model of three blocks, with an embedding and a head that belong to the root."""

    def __init__(self, dim: int = 7, *, further_parameters: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, further_parameters) for _ in range(3))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, seq] -> []
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


@dataclass
class Job:
    """One rank of a sharded model, on simulated streams."""

    model: Any
    schedule: Any
    optimizer: torch.optim.Optimizer
    simulation: Simulation
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    def batch(self) -> Tensor:
        return tokens(2)

    def loss(self) -> Tensor:
        with self.autocast():
            value: Tensor = self.model(self.batch())
        return value

    def micro_step(self, *, boundary: bool = False) -> None:
        with self.schedule.micro_step(boundary=boundary):
            self.loss().backward()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.loss()
        self.model.reshard()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def window(self, between: Callable[[], None] = lambda: None, micro_steps: int = 3) -> None:
        """Run one accumulation window and the step after it, with ``between`` before each micro-step."""
        self.simulation.begin_window()
        for micro_step in range(1, micro_steps + 1):
            between()
            self.micro_step(boundary=micro_step == micro_steps)
        self.step()


def train(job: Job) -> None:
    job.window()
    job.window(micro_steps=2)


def unshard_by_hand(job: Job) -> None:
    def between() -> None:
        job.blocks[1].unshard()
        job.blocks[1].reshard()
        job.blocks[0].unshard()

    job.window(between)


def unshard_asynchronously(job: Job) -> None:
    def between() -> None:
        handles = [block.unshard(async_op=True) for block in job.blocks]
        handles[0].wait()

    job.window(between)


def evaluate_inside_a_window(job: Job) -> None:
    job.window(job.evaluate, micro_steps=2)
    with job.schedule.cached_weights():
        job.evaluate()
        job.evaluate()


def prefetch(job: Job) -> None:
    blocks = list(job.blocks)
    if hasattr(job.model, "set_reduce_scatter_max_input_buffers"):
        job.model.set_reduce_scatter_max_input_buffers(2)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 3])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - 2) : index][::-1])
    job.window(micro_steps=2)
    for block in blocks:
        block.set_modules_to_forward_prefetch([])
        block.set_modules_to_backward_prefetch([])
    if hasattr(job.model, "set_reduce_scatter_max_input_buffers"):
        job.model.set_reduce_scatter_max_input_buffers(1)


def change_weights_inside(job: Job) -> None:
    def between() -> None:
        with torch.no_grad():
            for parameter in job.blocks[0].parameters():
                parameter.mul_(0.99)
            for parameter in job.blocks[1].parameters():
                parameter.to_local().mul_(0.99)
        job.schedule.invalidate_cache()

    job.window(between, micro_steps=2)


def train_on_a_stream_of_ones_own(job: Job) -> None:
    default, own = torch.cpu.current_stream(), torch.cpu.Stream()
    own.wait_stream(default)
    with torch.cpu.stream(own):
        job.window(micro_steps=2)
    default.wait_stream(own)
    job.window(micro_steps=2)


def optimize_manually(job: Job) -> None:
    first, second = list(job.blocks[0].parameters()), list(job.blocks[1].parameters())
    optimizers = [torch.optim.SGD(group, lr=0.01, momentum=0.9, foreach=True) for group in (first, second)]
    for turn in (0, 1):
        for parameters, wanted in ((first, turn == 0), (second, turn == 1)):
            for parameter in parameters:
                parameter.requires_grad_(wanted)
        for boundary in (False, True):
            with job.schedule.micro_step(boundary=boundary):
                loss = job.loss()
                job.schedule.window.before_backward()
                loss.backward()
        optimizers[turn].step()
        job.model.zero_grad()
    for parameter in (*first, *second):
        parameter.requires_grad_(True)


def abandon_a_window(job: Job) -> None:
    job.micro_step()
    job.schedule.window.abandon()
    job.window(micro_steps=2)


USAGES: dict[str, Callable[[Job], None]] = {
    "training": train,
    "unsharded by hand": unshard_by_hand,
    "unsharded asynchronously": unshard_asynchronously,
    "evaluation inside a window": evaluate_inside_a_window,
    "prefetch lists": prefetch,
    "weights changed inside a window": change_weights_inside,
    "a stream of one's own": train_on_a_stream_of_ones_own,
    "manual optimization": optimize_manually,
    "an abandoned window": abandon_a_window,
    "recomputation": train,
}


@contextmanager
def simulated_job(
    options: str, precision: str, *, recomputed: bool = False, further_parameters: int = 0, buffer: bool = False
) -> Iterator[Job]:
    """One rank of a job with an option set.

    Args:
        options: Option set by name.
        precision: Precision by Lightning's name.
        recomputed: Whether blocks are recomputed in backward.
        further_parameters: Number of parameters that each block has beside those of its layers.
        buffer: Whether the model has a buffer.
    """
    (world_size, ranks_per_node, partition_size), communication = OPTIONS[options]
    topology = Topology(world_size=world_size, ranks_per_node=ranks_per_node, partition_size=partition_size)
    with rehearsed_job(world_size=world_size, rank=world_size // 2 + 1):
        groups = groups_for(topology, communication)
        groups = replace(groups, backend="nccl")
        torch.manual_seed(0)
        model = Network(further_parameters=further_parameters).to(
            torch.bfloat16 if precision == "bf16-true" else torch.float32
        )
        if buffer:
            model.register_buffer("scale", torch.ones(3))
        schedule = shard_model(
            model,
            groups,
            communication=communication,
            activation_checkpointing=recomputed,
            mixed_precision=mixed_precision_policy(precision, reduce_dtype=PRECISIONS[precision]),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        mixed = precision == "bf16-mixed"
        with simulated_streams() as simulation:
            yield Job(
                model,
                schedule,
                optimizer,
                simulation,
                lambda: torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext(),
            )


@dataclass(frozen=True)
class Findings:
    """What a usage does wrong, in words.

    Attributes:
        order: Races, and memory that is reused too early.
        waits: Places where this package lets the host wait.
    """

    order: tuple[str, ...]
    waits: tuple[str, ...]


def precision_of(options: str) -> str:
    """The precision in which all usages of an option set run; in the others training does."""
    return list(PRECISIONS)[list(OPTIONS).index(options) % len(PRECISIONS)]


@cache
def findings(options: str) -> dict[str, Findings]:
    """What each usage does wrong with an option set; each runs once for all who ask."""
    found: dict[str, Findings] = {}
    for recomputed in (False, True):
        with simulated_job(options, precision_of(options), recomputed=recomputed) as job:
            for usage, run in USAGES.items():
                if recomputed == (usage == "recomputation"):
                    found[usage] = run_usage(job, run)
    return found


def trained(options: str, precision: str) -> Findings:
    """What training does wrong with an option set in a precision."""
    with simulated_job(options, precision) as job:
        return run_usage(job, train)


def run_usage(job: Job, run: Callable[[Job], None]) -> Findings:
    """Run one usage of a job and return what it does wrong."""
    simulation = job.simulation
    simulation.problems.clear()
    simulation.waits.clear()
    run(job)
    waits = tuple(place for place in simulation.waits if not place.startswith("user: "))
    return Findings(order=tuple(map(str, simulation.problems)), waits=waits)
