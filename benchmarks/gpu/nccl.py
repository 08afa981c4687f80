"""NCCL at one rank: groups, collectives in place, dtypes, and the Trainer's fit, save and resume without host waits."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import Stack
from benchmarks.gpu.ranks import alone, torchrun_of_one
from lightning_mics import MiCSStrategy, Topology, create_partition_groups
from lightning_mics.collectives.counted_group import CountedGroup
from lightning_mics.collectives.traffic import Traffic
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter

WARM_UP, WATCHED = 2, 20  # steps


def run(findings: Findings) -> None:
    """Run the part."""
    small = findings.device == "cpu"
    torchrun_of_one()
    warnings.filterwarnings("ignore")
    with alone(findings.device):
        with findings.attempt("collectives"):
            _collectives(findings)
        for precision in ("bf16-mixed",) if small else ("32-true", "bf16-mixed", "bf16-true"):
            with findings.attempt(f"fit, {precision}"):
                steps = _fit(findings.device, precision=precision, callbacks=[_NoHostWaits()]).global_step
                findings.add(
                    f"fit of {WATCHED} steps, {precision}, where a wait for the device raises", steps,
                    target=f"{WARM_UP + WATCHED} steps", holds=steps == WARM_UP + WATCHED,
                )  # fmt: skip
        for asynchronous in (True,) if small else (False, True):
            name = "async save" if asynchronous else "save"
            with findings.attempt(f"{name} and resume"):
                difference = _resume(findings.device, asynchronous)
                findings.add(f"{name} and resume: difference of weights", difference, target="0", holds=difference == 0)


def _collectives(findings: Findings) -> None:
    device = findings.device
    topology = Topology(world_size=1, ranks_per_node=1, partition_size=1)
    groups = create_partition_groups(topology, device_type=device)
    findings.add("groups are made, backend", groups.backend)
    counted = CountedGroup(groups.partition, nodes=[0], traffic=Traffic(), backend=groups.backend)
    gather = HierarchicalAllGather(rail=counted, node=counted)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with findings.attempt(f"all-gather in place, {dtype}"):
            whole = torch.arange(8, device=device, dtype=dtype)
            gather(whole, whole.narrow(0, 0, 8), groups.partition)
            _exact(findings, f"all-gather in place in two stages, {dtype}", whole, torch.arange(8.0))
    operations: dict[str, tuple[Any, float]] = {
        "SUM": (dist.ReduceOp.SUM, 1.0),
        "AVG": (dist.ReduceOp.AVG, 1.0),
        "PREMUL_SUM": (dist._make_nccl_premul_sum(0.5), 0.5),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, (op, factor) in operations.items():
            what = f"reduce-scatter in place in two stages, {name}, {dtype}"
            with findings.attempt(what):
                scatter = HierarchicalReduceScatter(rail=counted, node=counted)
                source = torch.ones(8, device=device, dtype=dtype)
                scatter(source, source, groups.partition, op)
                _exact(findings, what, source, torch.full((8,), factor))
    if device == "cpu":  # gloo has no PREMUL_SUM
        return
    with findings.attempt("torch's own PREMUL_SUM"):
        source = torch.ones(8, device=device, dtype=torch.bfloat16)
        result = torch.empty_like(source)
        dist.reduce_scatter_tensor(result, source, op=dist._make_nccl_premul_sum(0.5), group=groups.partition)
        findings.add("torch's own PREMUL_SUM by 0.5 of ones, bfloat16 (0.5 is right)", float(result[0]))
    with findings.attempt("messages in bfloat16"):
        tensor = torch.ones(8, device=device)
        counted.all_reduce(tensor, op=dist.ReduceOp.AVG, technique="trial", wire_dtype=torch.bfloat16)
        _exact(findings, "all-reduce with messages in bfloat16", tensor, torch.ones(8))


def _exact(findings: Findings, what: str, seen: Tensor, expected: Tensor) -> None:
    equal = torch.equal(seen.float().cpu(), expected)
    findings.add(what, "equal" if equal else str(seen.tolist()), target="equal", holds=equal)


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Stack()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class _NoHostWaits(pl.Callback):
    """Lets torch raise where the host waits for the device, from the third step to the last."""

    def _set(self, mode: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode(mode)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self._set("error")
        if trainer.global_step == WARM_UP + WATCHED:
            self._set("default")

    def on_exception(self, *_: Any) -> None:
        self._set("default")


class _Weights(pl.Callback):
    """Takes the weights at the end of a fit."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            whole: Any = parameter
            self.found[name] = whole.full_tensor().detach().cpu()


class _Save(pl.Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self._path)


def _fit(
    device: str,
    *,
    precision: Any = "32-true",
    steps: int = WARM_UP + WATCHED,
    resume: Path | None = None,
    batches: int = 64,
    **options: Any,
) -> pl.Trainer:
    torch.manual_seed(0)
    strategy = MiCSStrategy(async_save=options.pop("async_save", False))
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, strategy=strategy, precision=precision,
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    module = _Module()
    data = torch.randn(8 * batches, 33, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=8), ckpt_path=resume)
    return trainer


def _resume(device: str, asynchronous: bool) -> float:
    """The largest difference of weights between a run and one that was resumed in it."""
    whole, resumed = _Weights(), _Weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved.ckpt")
        fit = partial(_fit, device, steps=4, batches=1, async_save=asynchronous)
        fit(callbacks=[_Save(path), whole])
        fit(resume=path, callbacks=[resumed])
    assert whole.found.keys() == resumed.found.keys()
    return max(float((value - resumed.found[name]).abs().max()) for name, value in whole.found.items())
