from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.step_progress import StepProgressBar
from tests.models import TinyModule
from tests.trainers import loader, make_trainer


class Logs(TinyModule):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(2.5))


def run(folder: Path, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    bar = StepProgressBar(refresh_rate=1, line_every_n_steps=2, console=console)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 6, "max_epochs": -1, "val_check_interval": 6}
    trainer = make_trainer(
        folder, strategy="auto", devices=1, callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=0, **options
    )
    trainer.fit(Logs(), loader(16), loader(4))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_file_gets_a_line_now_and_then_without_control_codes(tmp_path: Path) -> None:
    lines = run(tmp_path, terminal=False).splitlines()
    assert "\x1b" not in "".join(lines)
    steps = [line.split()[1] for line in lines]
    assert steps == ["2/6", "3/6", "4/6", "6/6"] or steps == ["2/6", "3/6", "4/6", "6/6", "6/6"]
    assert all("train_loss" in line and "lr" in line for line in lines)
    assert "val_loss 2.500" in lines[1]


def test_a_terminal_gets_a_bar_over_optimizer_steps(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=True)
    assert "6/6" in text
    assert "12/6" not in text
    assert "\x1b[" in text
