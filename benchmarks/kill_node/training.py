"""The training that nodes die in: a small model with dropout, a schedule, validation and a resumable loader.

Each rank writes what happens to it to a file of its own, a line of JSON each. When the order of a death names this rank
and what it does now, it says so in that file and stops there, until it is killed.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import MiCSStrategy, ResumableSampler
from lightning_mics.checkpoint.dcp.writer import ShardWriter
from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.saver import StepSaver

BATCH = 4
SAMPLES = 4096


class Diary:
    """What happens to this rank, and the orders to die.

    Args:
        folder: Folder of the run.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._file = open(folder / f"rank-{rank}.jsonl", "a", buffering=1)  # noqa: SIM115
        self.step = 0
        self.is_first = False  # step since this process started

    def write(self, event: str, **facts: Any) -> None:
        """Write a line."""
        self._file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")

    def reach(self, moment: str) -> None:
        """Stop here if this is where the rank is to die."""
        try:
            order = json.loads((self._folder / "order.json").read_text())
        except (OSError, ValueError):
            return
        here = order["node"] == os.uname().nodename if "node" in order else order["rank"] == self._rank
        begun = self._folder / f"begun-{order['number']}"
        if here and order["moment"] == moment and not begun.exists():
            begun.touch()
            self.write("moment", number=order["number"], moment=moment, step=self.step)
            time.sleep(120)

    def rest(self, step: int) -> None:
        """Wait until the links have been read."""
        self.write("rest", step=step)
        while not (self._folder / f"rested-{step}").exists():
            time.sleep(0.05)


class Samples(Dataset[Tensor]):
    """Random vectors, some of them slow to load where a loader's worker is to die."""

    def __init__(self, width: int, diary: Diary) -> None:
        self._width, self._diary = width, diary

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:  # [width]
        self._diary.reach("fetch")
        return torch.randn(self._width, generator=torch.Generator().manual_seed(index))


class Model(L.LightningModule):
    """Blocks with dropout and a running mean, whose loss draws random numbers of all three kinds."""

    def __init__(self, options: dict[str, Any], diary: Diary) -> None:
        super().__init__()
        width = options["width"]
        self.options, self.diary = options, diary
        dropout = 0.1 if options["draws"] else 0.0
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout), nn.ReLU()) for _ in range(4)]
        self.net = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 1)
        self.register_buffer("mean", torch.zeros(width))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # [batch, width] -> []
        self.diary.step = self.global_step
        if self.diary.is_first:
            self.diary.reach("first step")
        if self.options["micro_steps"] > 1 and batch_idx % self.options["micro_steps"] == 1:
            self.diary.reach("window")
        noise = torch.zeros(())
        if self.options["draws"]:
            noise = 0.01 * (torch.rand(()) + random.random() + np.random.rand())
            self.mean.mul_(0.9).add_(batch.mean(0), alpha=0.1)
        loss = (self.head(self.net(batch - self.mean)) - 1).square().mean() + noise
        self.diary.write("loss", step=self.global_step, micro_step=batch_idx, value=loss.item().hex())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # [batch, width]
        self.diary.step = self.global_step
        self.diary.reach("validation")
        value = self.head(self.net(batch)).mean() + torch.rand(())
        self.diary.write("validation", step=self.global_step, micro_step=batch_idx, value=value.item().hex())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            result = optimizer_closure()
            self.diary.reach("optimizer")
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        done = self.global_step + 1  # Lightning counts this step when the hook has returned
        self.diary.write("done", step=done)
        if done in self.options["rest_at"]:
            self.diary.rest(done)
        self.diary.is_first = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.options["steps"])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.diary.write("agreed", step=checkpoint["global_step"])

    def on_train_start(self) -> None:
        faulthandler.register(signal.SIGTERM, chain=True)  # says in the log what a rank waits for that is to end
        self.diary.write("loaded", step=self.global_step)
        self.diary.is_first = self.global_step > 0

    def _loader(self, batches: int, samples: int | None = None) -> StatefulDataLoader[Tensor]:
        data = Samples(self.options["width"], self.diary)
        samples = BATCH * batches if samples is None else samples
        sampler: ResumableSampler = ResumableSampler(data, global_batch_size=samples)
        size = samples // batches
        return StatefulDataLoader(data, batch_size=size, sampler=sampler, num_workers=self.options["workers"])

    def train_dataloader(self) -> StatefulDataLoader[Tensor]:
        return self._loader(self.trainer.world_size * self.options["micro_steps"], self.options["samples"])

    def val_dataloader(self) -> StatefulDataLoader[Tensor]:
        return self._loader(self.trainer.world_size)


def stop_where_ordered(diary: Diary) -> None:
    """Let a rank die while a step is copied or written, before it is on two nodes, or while the rank recovers."""
    copy, again, ask, write = StepSaver._copy, StepSaver.copy, KeeperConnection.ask, ShardWriter.write_data

    def copied(self: StepSaver, slots: Any, slot: int, saving: Any) -> None:
        diary.reach("copy")
        copy(self, slots, slot, saving)

    def copied_again(self: StepSaver, *arguments: Any) -> None:
        diary.reach("recovery")
        again(self, *arguments)
        diary.write("protected again")

    def asked(self: KeeperConnection, request: dict[str, Any], *payload: Any, **options: Any) -> Any:
        if request["do"] == "wait":
            diary.reach("unprotected")
        return ask(self, request, *payload, **options)

    def written(self: ShardWriter, *arguments: Any) -> Any:
        result = write(self, *arguments)  # this rank's file is there, the checkpoint is not
        diary.reach("save")
        return result

    patched: list[tuple[Any, str, Callable[..., Any]]] = [
        (StepSaver, "_copy", copied),
        (StepSaver, "copy", copied_again),
        (KeeperConnection, "ask", asked),
        (ShardWriter, "write_data", written),
    ]
    for kind, name, function in patched:
        setattr(kind, name, function)


def digests_of(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """SHA-256 of this rank's weights, optimizer states and random number generators."""
    optimizer = trainer.optimizers[0]
    states = [state[key] for p in module.parameters() for state in [optimizer.state[p]] for key in sorted(state)]
    numpy: Any = np.random.get_state()
    return {
        "weights": _digest(_bytes_of(list(module.state_dict().values()))),
        "optimizer": _digest(_bytes_of(states)),
        "random": _digest(
            [torch.get_rng_state().numpy().tobytes(), repr((random.getstate(), numpy[1].tolist(), numpy[2])).encode()]
        ),
    }


def _bytes_of(tensors: list[Any]) -> list[bytes]:
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return [tensor.detach().numpy().tobytes() for tensor in local]


def _digest(content: list[bytes]) -> str:
    return hashlib.sha256(b"".join(content)).hexdigest()


def callbacks_of(options: dict[str, Any]) -> list[L.Callback]:
    """A callback that saves on a disk that all nodes share, if steps are to be saved there."""
    if not options["save_every"]:
        return []
    folder = Path(options["folder"], "checkpoints")
    return [ModelCheckpoint(folder, every_n_train_steps=options["save_every"], save_last=True)]


def pinned(options: dict[str, Any]) -> dict[str, Any]:
    """Choices that are else made by how fast links are, which is measured at each start."""
    return {
        "hierarchical": options["partition_size"] > options["ranks_per_node"] > 1,
        "cache_parameters": "rank",
        "accumulate_gradients": "rank",
    }


def main() -> None:
    """What each rank runs."""
    options = json.loads(os.environ["KILL_NODE_OPTIONS"])
    folder = Path(options["folder"])
    diary = Diary(folder, int(os.environ["RANK"]))
    diary.write("start", process=os.getpid(), node=os.uname().nodename)
    report = sys.excepthook

    def noticed(kind: Any, error: Any, trace: Any) -> None:
        diary.write("noticed", error=f"{kind.__name__}: {error}"[:1000])
        report(kind, error, trace)

    sys.excepthook = noticed
    stop_where_ordered(diary)
    L.seed_everything(1 + int(os.environ["RANK"]), verbose=False)
    torch.manual_seed(1)  # the same weights; the other generators differ
    model = Model(options, diary)
    torch.manual_seed(2 + int(os.environ["RANK"]))
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    trainer = L.Trainer(
        strategy=MiCSStrategy(
            partition_size=options["partition_size"],
            in_memory_checkpoint=options["in_memory_checkpoint"],
            **(pinned(options) if options["rest_at"] else {}),
        ),
        accelerator="cpu",
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        max_steps=options["steps"],
        accumulate_grad_batches=options["micro_steps"],
        val_check_interval=options["validate_every"] * options["micro_steps"],
        limit_val_batches=2,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks_of(options),
        enable_checkpointing=bool(options["save_every"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    from_disk = options["save_every"] and options["in_memory_checkpoint"] is None
    trainer.fit(model, ckpt_path="last" if from_disk else None)
    written = Path("/proc/self/io").read_text().partition("\nwrite_bytes: ")[2].split("\n")[0]
    diary.write("end", digests=digests_of(trainer, model), disk_bytes=int(written))


if __name__ == "__main__":
    main()
