"""Trains until it is stopped or has come to a step, and writes what became of it to ``FOLDER/rank-N.json``.

python tests/support/preempted_script.py FOLDER MAX_STEPS [CKPT_PATH]
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script, in a process of its own


class FirstStep(Callback):
    """Keeps the step from which a run went on, and says when it trains."""

    step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step + 3 and trainer.is_global_zero:
            print("training", flush=True)


def main(folder: str, max_steps: str, ckpt_path: str | None = None, *callbacks: Callback, **options: Any) -> None:
    torch.manual_seed(1)
    first = FirstStep()
    trainer = make_trainer(
        folder,
        strategy="mics",
        max_epochs=-1,
        max_steps=int(max_steps),
        callbacks=[first, ModelCheckpoint(dirpath=Path(folder, "checkpoints"), every_n_epochs=10**6), *callbacks],
        enable_checkpointing=True,
        **{"devices": 2, **options},
    )
    stopped = True
    try:
        trainer.fit(TinyModule(), loader(8), ckpt_path=ckpt_path)
        stopped = False
    finally:
        facts = {"first": first.step, "last": trainer.global_step, "stopped": stopped}
        Path(folder, f"rank-{trainer.global_rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork of torchrun has torchrun's handler
    try:
        main(*sys.argv[1:])
    except SIGTERMException as stop:
        Path(sys.argv[1], f"code-{stop.code}").touch()
        raise
