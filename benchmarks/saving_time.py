"""How long training stands still while a checkpoint is saved, and who writes and reads how much of it.

python -m benchmarks.saving_time --rounds 3 --out benchmarks/results/saving

Four processes of this machine train a model whose states (fp32 weights and AdamW's) weigh ``--gigabytes``, and save it
several times under each system in turns: this package with ``async_save``, without it, with one replica, and
Lightning's own ``ModelParallelStrategy`` with FSDP2, with one replica over all ranks and with two. Training stands
still for as long as ``trainer.save_checkpoint`` takes on the slowest rank; the steps after it show what writing beside
them costs. The folder gets a page and all numbers as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics import MiCSStrategy

RANKS, WIDTH, STATES_PER_PARAMETER = 4, 1024, 3  # a weight, and AdamW's two moments
LIGHTNING = "lightning-model-parallel"
# each is compared with Lightning's of as many replicas: a rank then has as much to save and to load
COMPARED = {
    "mics, async_save": f"{LIGHTNING}, two replicas",
    "mics": f"{LIGHTNING}, two replicas",
    f"{LIGHTNING}, two replicas": f"{LIGHTNING}, two replicas",
    "mics, one replica": LIGHTNING,
    LIGHTNING: LIGHTNING,
}
SYSTEMS = tuple(COMPARED)
SAVES, STEPS_BETWEEN = 3, 2  # of one fit; the first save also has to find memory and is told apart
STARTS = 2  # afresh, and resumed, after each fit


class Model(pl.LightningModule):
    """Residual blocks of two linear layers; it shards itself where a strategy leaves that to the user.

    Args:
        blocks: Number of blocks.
        replicas: Number of replicas, where it shards itself.
    """

    def __init__(self, blocks: int, replicas: int) -> None:
        super().__init__()
        self.replicas = replicas
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False))
            for _ in range(blocks)
        )

    def configure_model(self) -> None:
        if type(self.trainer.strategy) is ModelParallelStrategy:
            axes = ("replicate", "shard")
            mesh = init_device_mesh("cpu", (self.replicas, RANKS // self.replicas), mesh_dim_names=axes)
            for block in self.blocks:
                fully_shard(block, mesh=mesh if self.replicas > 1 else mesh["shard"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch  # [batch, width]
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class SaveAndTime(Callback):
    """Saves every few steps, and times that and the steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.save_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        dist.barrier()
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.begun)
        if trainer.global_step % STEPS_BETWEEN == 0:
            dist.barrier()
            begun = time.perf_counter()
            trainer.save_checkpoint(self.folder / f"{len(self.save_seconds)}.ckpt")
            self.save_seconds.append(time.perf_counter() - begun)


class StartTime(Callback):
    """Times a fit until its first batch is there, on the slowest rank."""

    def __init__(self) -> None:
        dist.barrier()
        self.begun, self.seconds = time.perf_counter(), 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.seconds:
            dist.barrier()
            self.seconds = time.perf_counter() - self.begun


def strategy_of(system: str) -> Any:
    """A new strategy for one of :data:`SYSTEMS`."""
    if system.startswith(LIGHTNING):
        return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo")
    return MiCSStrategy(
        partition_size=RANKS // replicas_of(system), ranks_per_node=RANKS // 2,
        async_save=system.endswith("async_save"),
        cache_parameters="never", accumulate_gradients="shard",
    )  # fmt: skip


def replicas_of(system: str) -> int:
    """Number of replicas of one of :data:`SYSTEMS`."""
    return 1 if COMPARED[system] == LIGHTNING else 2


def work(rounds: int, blocks: int, out: Path) -> None:
    """What each rank runs; rank 0 writes the measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    warnings.filterwarnings("ignore")
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        for number in range(rounds):
            for system in SYSTEMS[number % len(SYSTEMS) :] + SYSTEMS[: number % len(SYSTEMS)]:
                measured.append({"round": number, "system": system, **measure(system, blocks, Path(scratch))})
                _free_memory()
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(measured, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def measure(system: str, blocks: int, scratch: Path) -> dict[str, Any]:
    """Fit under ``system``, saving on the way, then start afresh, and resume from its last checkpoint."""
    folders: list[Any] = [tempfile.mkdtemp(dir=scratch) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    timer = SaveAndTime(folder)
    torch.manual_seed(0)
    model = Model(blocks, replicas_of(system))
    trainer = _trainer(system, callbacks=[timer], max_steps=(SAVES + 1) * STEPS_BETWEEN - 1)
    trainer.fit(model, _data())
    steps, last = trainer.global_step, folder / f"{SAVES - 1}.ckpt"
    facts = {
        "save_seconds": _slowest(timer.save_seconds),
        "step_seconds": _slowest(timer.step_seconds),
        "written_bytes": [file.stat().st_size for file in sorted(last.glob("__*.distcp"))],
    }
    del trainer, model
    facts |= {"start_seconds": [], "resume_seconds": []}
    for _ in range(STARTS):
        facts["start_seconds"].append(_started(system, blocks, max_steps=1))
        read_before = _read_bytes()
        facts["resume_seconds"].append(_started(system, blocks, max_steps=steps + 1, ckpt_path=last))
    amounts: list[Any] = [None] * RANKS
    dist.all_gather_object(amounts, _read_bytes() - read_before)
    facts["read_bytes"] = amounts
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return facts


def _started(system: str, blocks: int, *, max_steps: int, ckpt_path: Path | None = None) -> float:
    """Seconds until a fit begins its first step, afresh or resumed."""
    _free_memory()
    model, data = Model(blocks, replicas_of(system)), _data()
    timer = StartTime()
    trainer = _trainer(system, callbacks=[timer], max_steps=max_steps)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return timer.seconds


def _free_memory() -> None:
    """Give the memory of earlier fits back to the system: models are in cycles, and the allocator keeps what it has."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _trainer(system: str, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy_of(system), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def _data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0))), batch_size=8)


def _slowest(seconds: list[float]) -> list[float]:
    tensor = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()  # type: ignore[no-any-return]


def _read_bytes() -> int:
    """What this process has asked its files for, the page cache included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def write_page(out: Path, arguments: Sequence[str], gigabytes: float, rounds: int) -> None:
    """The page of results from the measurements."""
    measured = json.loads((out / "results.json").read_text())
    by_system = {name: [entry for entry in measured if entry["system"] == name] for name in SYSTEMS}
    later = {name: [s for entry in of for s in entry["save_seconds"][1:]] for name, of in by_system.items()}
    starts_of = {name: [s for entry in of for s in entry["start_seconds"]] for name, of in by_system.items()}
    resumed = {name: [s for entry in of for s in entry["resume_seconds"]] for name, of in by_system.items()}
    loading = {name: [s - statistics.median(starts_of[name]) for s in resumed[name]] for name in SYSTEMS}
    rows, starts = [], []
    for name, of in by_system.items():
        seconds, first = later[name], [entry["save_seconds"][0] for entry in of]
        steps, other = [s for entry in of for s in entry["step_seconds"]], COMPARED[name]
        rows.append(
            f"| {name} | {_spread(first)} | {_spread(seconds)} | {_ratio(seconds, later[other]):.3f} "
            f"| {_spread(steps)} |"
        )
        starts.append(
            f"| {name} | {_spread(starts_of[name])} | {_spread(resumed[name])} | {_spread(loading[name])} "
            f"| {_ratio(loading[name], loading[other]):.2f} |"
        )
    amounts = []
    for name, of in by_system.items():
        written, read = of[-1]["written_bytes"], of[-1]["read_bytes"]
        amounts.append(f"| {name} | {_amounts(written)} | {_amounts(read)} |")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    (out / "README.md").write_text(
        f"""# How long training stands still while a checkpoint is saved

**Question.** A state of {gigabytes:g} GB (fp32 weights and AdamW's moments) is saved by {RANKS} ranks: for how long
does training stand still, and how much does each rank write, and read when it resumes?

**Machine.** {os.cpu_count()} cores, {platform.system()} {platform.release()}, one local disk; {versions}.

**Constants.** {RANKS} CPU processes with one thread each, partition groups of {RANKS // 2} (one replica: of {RANKS});
width {WIDTH}; {rounds} rounds in turns, each with {SAVES} saves, {STEPS_BETWEEN} steps apart, and {STARTS} starts of
each kind. All figures are *measured*: median (least - greatest), seconds on the slowest rank.

**Commit.** {commit}, {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.saving_time {" ".join(arguments)}
```

| system | first save | later saves | of Lightning's | steps, beside writing too |
|---|---|---|---|---|
{chr(10).join(rows)}

Until the first step begins, from ``fit`` on: afresh, resumed from the last checkpoint, and the difference to the median
afresh, which is loading. Ratios are to Lightning's with as many replicas, where a rank loads as much. With two replicas
Lightning's reads all of it on each rank; ours reads half, and gets the other half from the other replica.

| system | afresh | resumed | loading | of Lightning's |
|---|---|---|---|---|
{chr(10).join(starts)}

| system | MB written by each rank | most over mean | MB read by each rank when resuming | most over mean |
|---|---|---|---|---|
{chr(10).join(amounts)}

Reading counts every byte that a process asks files for. Ours checks each block of a file as it reads it; Lightning's
checks nothing. Compare the steps of the first two rows, which show the cost of writing asynchronously on cores that
training needs as well.
"""
    )


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(seconds) / statistics.median(others)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def _amounts(amounts: Sequence[int]) -> str:
    """Each rank's, and the most over the mean."""
    megabytes = ", ".join(f"{amount / 1e6:.1f}" for amount in amounts)
    return f"{megabytes} | {max(amounts) / statistics.mean(amounts):.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch the ranks and write the page; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights and optimizer states (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="of all systems (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    blocks = max(1, round(options.gigabytes * 1e9 / (8 * WIDTH**2 * 4 * STATES_PER_PARAMETER)))
    options.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        work(options.rounds, blocks, options.out)
        return 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    ended = subprocess.run(
        [*torchrun, "-m", "benchmarks.saving_time", *typed], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if ended.returncode == 0:
        write_page(options.out, typed, options.gigabytes, options.rounds)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
