"""How much time of the host a step takes: of this package, of plain FSDP2, and of another checkout of this package.

python -m benchmarks.host_time --turns 20 --against ../before --out benchmarks/results/host_time

Two processes of this machine train a language model of small blocks, in which the host's work is nearly all of a step:
two micro-steps and a step of AdamW. Each turn measures every system in a process group of its own, in changing order,
and a ratio compares two systems of the same turn. Calls of Python functions per step are exact; they do not depend on
what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

RANKS, LAYERS, VOCABULARY, BATCH, SEQUENCE = 2, 8, 64, 4, 16
WARM_UP, COUNTED = 4, 2
SYSTEMS = {  # options of CommunicationOptions by system; None is plain FSDP2
    "fsdp2": None,
    "mics, as in the paper": {"cache_parameters": "never", "accumulate_gradients": "shard"},
    "mics, once per step": {"cache_parameters": "rank", "accumulate_gradients": "rank"},
}


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, sequence, width] -> same
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, sequence] -> []
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


def step_of(system: str, width: int) -> Callable[[], None]:
    """A function that runs one optimizer step of two micro-steps under one of :data:`SYSTEMS`."""
    torch.manual_seed(0)
    model = Model(width)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    options = SYSTEMS[system]
    if options is None:
        for block in model.blocks:
            fully_shard(block)
        sharded: Any = fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            for _ in range(2):
                sharded(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model

    groups = create_partition_groups(
        Topology(world_size=RANKS, ranks_per_node=RANKS, partition_size=RANKS), device_type="cpu"
    )
    schedule = shard_model(model, groups, communication=CommunicationOptions(**options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def scheduled() -> None:
        for boundary in (False, True):
            with schedule.micro_step(boundary=boundary):
                model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return scheduled


def calls_of(step: Callable[[], None]) -> float:
    """Calls of Python and C functions in one step."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    for _ in range(COUNTED):
        step()
    sys.setprofile(None)
    return calls / COUNTED


def measure(rank: int, system: str, width: int, steps: int, folder: str) -> None:
    """What each rank runs; rank 0 writes seconds of the clock and of the processor, and calls, per step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    step = step_of(system, width)
    for _ in range(WARM_UP):
        step()
    wall, processor = [], []
    for _ in range(steps):
        begun, worked = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begun)
        processor.append(time.process_time() - worked)
    calls = calls_of(step)  # on all ranks: it communicates
    if rank == 0:
        found = {"wall": statistics.median(wall), "processor": statistics.median(processor), "calls": calls}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured_in(checkout: Path, system: str, width: int, steps: int) -> dict[str, float]:
    """Measure a system with the package of a checkout, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        sizes = ["--width", str(width), "--steps", str(steps)]
        command = [sys.executable, __file__, "--measure", system, *sizes, "--out", folder]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(Path(folder, "found.json").read_text())
        return found


def compare(against: Path | None, width: int, turns: int, steps: int) -> Iterator[list[dict[str, Any]]]:
    """Measure all systems in turns: after each, all measurements so far with their turn, system and checkout."""
    here = Path(__file__).resolve().parents[1]
    runs = [(here, "now", system) for system in SYSTEMS]
    if against is not None:
        runs += [(against.resolve(), "before", system) for system, options in SYSTEMS.items() if options is not None]
    measured: list[dict[str, Any]] = []
    for turn in range(turns):
        for checkout, age, system in runs if turn % 2 == 0 else runs[::-1]:
            measured.append(
                {"turn": turn, "system": system, "checkout": age, **measured_in(checkout, system, width, steps)}
            )
        yield measured


def ratio(measured: Sequence[dict[str, Any]], one: tuple[str, str], other: tuple[str, str], what: str) -> list[float]:
    """Geometric mean over turns of one run's figure over another's, and the ends of its 95 % interval.

    Args:
        measured: Measurements of all turns.
        one: System and checkout of the dividend.
        other: System and checkout of the divisor.
        what: Figure to compare.

    Returns:
        Mean, lower end, upper end.
    """
    by_turn: dict[int, dict[tuple[str, str], float]] = {}
    for entry in measured:
        by_turn.setdefault(entry["turn"], {})[entry["system"], entry["checkout"]] = entry[what]
    return geometric_mean_with_interval([found[one] / found[other] for found in by_turn.values()])


def geometric_mean_with_interval(ratios: Sequence[float]) -> list[float]:
    """Geometric mean of ratios, and the ends of its 95 % interval over 20 turns.

    Args:
        ratios: Ratio of each turn.
    """
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    reach = 2.09 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0  # Student's, 19 of freedom
    return [math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)]


def write_page(out: Path, arguments: Sequence[str], measured: Sequence[dict[str, Any]], width: int, steps: int) -> None:
    """The page of results from the measurements."""
    turns = 1 + max(entry["turn"] for entry in measured)
    rows = []
    for system in SYSTEMS:
        for age, other in (("now", ("fsdp2", "now")), ("now", (system, "before"))):
            try:
                ratios = {what: ratio(measured, (system, age), other, what) for what in ("wall", "processor", "calls")}
            except KeyError:
                continue  # not measured
            if (system, age) == other:
                continue
            of = {
                what: statistics.median(
                    entry[what] for entry in measured if (entry["system"], entry["checkout"]) == (system, age)
                )
                for what in ratios
            }
            shown = " | ".join("{:.3f} ({:.3f} - {:.3f})".format(*ratios[what]) for what in ("wall", "processor"))
            against = "plain FSDP2" if other[0] == "fsdp2" else "the other checkout"
            rows.append(
                f"| {system} | {against} | {1e3 * of['wall']:.1f} | {of['calls']:.0f} "
                f"| {shown} | {ratios['calls'][0]:.3f} |"
            )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    (out / "README.md").write_text(
        f"""# Time of the host per step

**Question.** How much longer does the host take for a step than under plain FSDP2, and than before?

**Machine.** {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python {platform.python_version()}, torch
{torch.__version__}.

**Constants.** {RANKS} CPU processes with one thread each, one partition group; {LAYERS} blocks of width {width}, two
micro-steps and a step of AdamW; {turns} turns. Medians of {steps} steps; ratios are geometric means over turns of
figures of the same turn, with their 95 % interval.

**Commit.** {commit}, {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.host_time {" ".join(arguments)}
```

| system | against | ms | calls | ratio of the clock | ratio of the processor's time | ratio of calls |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one system, or compare all and write the page; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=20, help="of all systems (default: 20)")
    parser.add_argument("--width", type=int, default=32, help="of the model (default: 32)")
    parser.add_argument("--steps", type=int, default=24, help="of each measurement (default: 24)")
    parser.add_argument("--against", type=Path, help="root of another checkout, such as a git worktree")
    parser.add_argument("--measure", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    if options.measure:
        mp.start_processes(
            measure, (options.measure, options.width, options.steps, str(options.out)), RANKS, start_method="fork"
        )
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for measured in compare(
        options.against, options.width, options.turns, options.steps
    ):  # what there is stays if it is ended
        (options.out / "results.json").write_text(json.dumps(measured, indent=1))
        write_page(options.out, typed, measured, options.width, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
