"""Kill ranks of a training job at random moments while it saves, again and again, and see that it goes on unharmed.

python -m tests.stress.kill_while_saving --kills 100

Ranks are processes of this machine. They train a small model and save after every step to one and the same path, so
that most of their time is spent on writing and on replacing; half of the jobs wait for it, and half train on. SIGKILL
hits some of the ranks, or all; the job starts again from the checkpoint, and goes through the same steps with data that
depend on the step alone. Every resume must find a checkpoint no older than the last that had been finished, and every
loss must be, bit for bit, that of a run that nobody killed. The exit status says whether it was so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import Topology, checkpoint, create_partition_groups, shard_model
from lightning_mics.checkpoint.async_save import BackgroundSaving
from lightning_mics.checkpoint.dcp.save_planner import HostBuffers
from lightning_mics.checkpoint.optimizer_states import optimizer_state

WIDTH, LAYERS = 256, 4


START_SECONDS = 60.0


LONGEST_SECONDS = 1.0  # from the first step of a job to its end by SIGKILL


class Model(nn.Module):
    """A few blocks, with enough weights that writing them takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


@dataclass
class Report:
    """What one job has told before its end.

    Attributes:
        resumed: The step it began at; None before it has.
        finished: Steps whose checkpoint was finished.
        losses: Losses by step and rank.
        failures: What went wrong other than by SIGKILL.
    """

    resumed: int | None = None
    finished: int = 0
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.kill_while_saving")
    parser.add_argument("--kills", type=int, default=100, help="how often (default: 100)")
    parser.add_argument("--ranks", type=int, default=4, help="processes of the job (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks that are hit (default: 0)")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    losses: dict[tuple[int, int], float] = {}
    wrong: list[str] = []
    finished = 0
    with tempfile.TemporaryDirectory() as folder:
        for kill in range(options.kills):
            report = run_until_killed(Path(folder), options.ranks, chance)
            wrong += [f"kill {kill + 1}: {failure}" for failure in report.failures]
            if report.resumed is not None and report.resumed < finished:
                wrong.append(f"kill {kill + 1}: resumed at step {report.resumed}, and {finished} was finished")
            finished = max(finished, report.finished)
            losses.update({at: loss for at, loss in report.losses.items() if at not in losses})
            wrong += differences(report.losses, losses, f"kill {kill + 1}, against an earlier run of the same step")
        steps = 1 + max((step for step, _ in losses), default=0)
        undisturbed = run_undisturbed(Path(folder) / "alone", options.ranks, steps)
        wrong += differences(losses, undisturbed, "against a run that nobody killed")
    print(
        f"{options.kills} kills of a job of {options.ranks} ranks; {steps} steps, {len(losses)} losses compared; "
        f"{len(wrong)} wrong"
    )
    print(*wrong[:20], sep="\n")
    return 1 if wrong else 0


def differences(seen: dict[tuple[int, int], float], expected: dict[tuple[int, int], float], where: str) -> list[str]:
    """Losses that are not exactly what they should be, in words."""
    return [
        f"{where}: the loss of step {at[0]} on rank {at[1]} is {loss!r} instead of {expected.get(at)!r}"
        for at, loss in sorted(seen.items())
        if loss != expected.get(at)
    ]


def run_until_killed(folder: Path, ranks: int, chance: random.Random) -> Report:
    """One job, from its checkpoint to its end by SIGKILL."""
    report, processes, ends = Report(), *_start(folder, ranks, steps=None, beside=chance.random() < 0.5)
    hit = chance.sample(range(ranks), chance.randint(1, ranks))
    deadline = time.monotonic() + START_SECONDS
    started = False
    while time.monotonic() < deadline and ends and not report.failures:
        _listen(ends, report, timeout=0.005)
        if not started and report.resumed is not None:
            started, deadline = True, time.monotonic() + chance.uniform(0, LONGEST_SECONDS)
    if not started:
        report.failures.append(f"no step within {START_SECONDS} s")
    for rank in hit:
        processes[rank].kill()
    for process in processes:  # the others notice, and end by themselves or are ended
        process.join(timeout=0.05)
        process.kill()
        process.join()
    _listen(ends, report, timeout=0, after_kill=True)
    return report


def run_undisturbed(folder: Path, ranks: int, steps: int) -> dict[tuple[int, int], float]:
    """Losses of a job that is left alone and saves nothing."""
    report, processes, ends = Report(), *_start(folder, ranks, steps=steps, beside=False)
    while any(process.is_alive() for process in processes):
        _listen(ends, report, timeout=0.1)
    _listen(ends, report, timeout=0)
    return report.losses


def _start(folder: Path, ranks: int, *, steps: int | None, beside: bool) -> tuple[list[Any], dict[Connection, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    store = tempfile.mktemp(dir=folder, prefix=".store-")
    context, processes, ends = multiprocessing.get_context("fork"), [], {}
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_job, args=(folder, rank, ranks, store, sender, steps, beside))
        process.start()
        sender.close()
        processes.append(process)
        ends[receiver] = rank
    return processes, ends


def _listen(ends: dict[Connection, int], report: Report, *, timeout: float, after_kill: bool = False) -> None:
    """Take in what ranks have told by now; wait for the first of it at most ``timeout`` seconds."""
    while ready := wait(list(ends), timeout=timeout):
        for end in ready:
            assert isinstance(end, Connection)
            try:
                kind, *values = end.recv()
            except (EOFError, OSError):
                del ends[end]
                continue
            if kind == "resumed" and ends[end] == 0:
                report.resumed = values[0]
            elif kind == "finished":
                report.finished = max(report.finished, values[0])
            elif kind == "loss":
                report.losses[values[0], ends[end]] = values[1]
            elif kind == "failed" and not after_kill:
                report.failures.append(f"rank {ends[end]}: {values[0]}")
        timeout = 0


def _job(folder: Path, rank: int, ranks: int, store: str, told: Connection, steps: int | None, beside: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
        )
        _train(folder / "last.ckpt", rank, ranks, told, steps, BackgroundSaving() if beside else None)
    except Exception as error:
        told.send(("failed", repr(error)))
    told.close()
    os._exit(0)


def _train(
    path: Path, rank: int, ranks: int, told: Connection, steps: int | None, beside: BackgroundSaving | None
) -> None:
    """Train from the checkpoint, if there is one, and save after each step, unless ``steps`` says when to stop."""
    tell = _Told(told)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=30)) if beside else None
    torch.manual_seed(0)
    model = Model()
    topology = Topology(world_size=ranks, ranks_per_node=ranks, partition_size=max(1, ranks // 2))
    schedule = shard_model(model, create_partition_groups(topology, device_type="cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    first = 0
    if path.exists() or any(path.parent.glob(f".{path.name}.former")):
        meta = checkpoint.load(path, model=model, optimizers=[optimizer], strict=True, weights_only=True)
        first = meta["step"]
    tell(("resumed", first))
    step = first
    while steps is None or step < steps:
        batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step * ranks + rank))
        with schedule.micro_step(boundary=True):
            loss = model(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tell(("loss", step, loss.item()))
        step += 1
        if steps is None:
            save = partial(
                _save, path, model, optimizer, step=step, group=group, finished=partial(tell, ("finished", step))
            )
            beside.save(str(step), save) if beside else save(None)()


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    buffers: HostBuffers | None,
    *,
    step: int,
    group: dist.ProcessGroup | None,
    finished: Callable[[], None],
) -> Callable[[], None]:
    """Prepare a checkpoint, and return what writes it and tells so."""
    write = checkpoint.prepare_sharded(
        path,
        model_state=model.state_dict(),
        optimizer_states=[optimizer_state(model, optimizer, sharded=True)],
        meta={"step": step},
        rank_state=None,
        group=group,
        buffers=buffers,
    )

    def write_and_tell() -> None:
        write()
        finished()

    return write_and_tell


class _Told:
    """A pipe that two threads may write to."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            self._pipe.send(message)


if __name__ == "__main__":
    sys.exit(main())
