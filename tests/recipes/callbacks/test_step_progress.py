from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.callbacks.step_progress import StepProgressBar
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer


class Logs(TinyModule):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(2.5))


def run(folder: Path, *, terminal: bool, refresh_rate: int = 1) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    bar = StepProgressBar(refresh_rate=refresh_rate, line_every_n_steps=2, console=console)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 6, "max_epochs": -1, "val_check_interval": 6}
    trainer = make_trainer(
        folder, strategy="auto", devices=1, callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=0, **options
    )
    trainer.fit(Logs(), loader(48), loader(4))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_file_gets_a_line_now_and_then_without_control_codes(tmp_path: Path) -> None:
    """6 steps of two micro-steps, a line for every second; a validation after 3 and 6."""
    text = run(tmp_path, terminal=False)
    assert "\x1b" not in text and "\r" not in text
    lines = [line.split("  ") for line in text.splitlines()]
    assert [line[0] for line in lines] == ["step 2/6", "step 3/6", "step 4/6", "step 6/6", "step 6/6"]
    assert [[value.split()[0] for value in line[1:]] for line in lines] == [
        ["train_loss", "lr"],
        ["train_loss", "val_loss"],
        ["train_loss", "lr"],
        ["train_loss", "lr"],
        ["train_loss", "val_loss"],
    ]
    assert lines[1][2] == "val_loss 2.500"


def test_a_terminal_gets_a_bar_over_optimizer_steps_and_a_line_for_each_validation(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=True)
    assert "6/6" in text
    assert "12/6" not in text
    assert "\x1b[" in text
    assert text.count("val_loss 2.500") == 2


def test_the_bar_ends_full_where_its_last_look_was_before_the_end(tmp_path: Path) -> None:
    *_, last_drawn = run(tmp_path, terminal=True, refresh_rate=4).rsplit("\r")
    assert "6/6" in last_drawn and "4/6" not in last_drawn


def test_ranks_but_the_first_show_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    bar = StepProgressBar(refresh_rate=1, line_every_n_steps=1, console=console)
    assert bar.is_enabled
    bar.disable()
    bar.print("something")
    assert not bar.is_enabled and console.file.getvalue() == ""  # type: ignore[attr-defined]
