from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.report.curves import LOSSES, PANELS, draw
from recipes.report.history import History
from recipes.report.page import write_report
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer

SERIES = {
    "train_loss": [(5, 7.0), (10, 6.0)],
    "val_loss": [(10, 6.5)],
    "tokens_per_s": [(5, 1000.0), (10, 1100.0)],
    "lr": [(5, 1e-3), (10, 9e-4)],
}


def fit(folder: Path, *, steps: int, resume: Path | None = None) -> tuple[History, list[float]]:
    """Steps of two micro-steps, every second one logged, a validation after every third."""
    history, losses = History(path=str(folder / "run" / "loss.png")), []

    class Noting(TinyModule):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    trainer = make_trainer(
        folder,
        strategy="auto",
        devices=1,
        callbacks=[history, ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        val_check_interval=6,
        num_sanity_val_steps=0,
        max_steps=steps,
        max_epochs=-1,
    )
    trainer.fit(Noting(), loader(48), loader(4), ckpt_path=resume, weights_only=False)
    return history, losses


def test_the_training_loss_is_the_mean_since_the_last_note_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, losses = fit(tmp_path / "whole", steps=6)
    means = [sum(losses[start : start + 4]) / 4 for start in (0, 4, 8)]
    assert whole.series["train_loss"] == list(zip((2, 4, 6), map(pytest.approx, means), strict=True))
    assert [step for step, _ in whole.series["val_loss"]] == [3, 6]
    assert whole.series["lr"] == [(2, 0.1), (4, 0.1), (6, 0.1)]
    resumed, _ = fit(tmp_path / "resumed", steps=6, resume=tmp_path / "whole" / "step=3.ckpt")
    assert resumed.series.keys() == whole.series.keys()
    assert [step for step, _ in resumed.series["train_loss"]] == [2, 4, 6]
    assert resumed.series["train_loss"][0] == whole.series["train_loss"][0]
    assert (tmp_path / "resumed" / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_panel_is_drawn_for_what_was_measured_only_with_what_it_is_held_against() -> None:
    figure = draw(SERIES, PANELS, references={"val_loss": {"trigram": 5.5}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["nats per token", "tokens/s", "lr"]
    training, validation, reference = figure.axes[0].lines
    assert list(zip(*training.get_data(), strict=True)) == SERIES["train_loss"]
    assert list(zip(*validation.get_data(), strict=True)) == SERIES["val_loss"]
    assert set(reference.get_ydata()) == {5.5}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "validation"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["trigram"]


def test_a_value_that_is_no_number_leaves_the_others_drawn() -> None:
    figure = draw({"grad_norm": [(5, 2.0), (10, float("inf"))]}, PANELS)
    assert figure.axes[0].get_ylim() == pytest.approx((0, 2.2))


def test_before_anything_was_measured_there_is_nothing_to_draw() -> None:
    assert draw({}, [LOSSES]).axes == []


def test_the_report_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    write_report(
        tmp_path / "run" / "report.html",
        title="gpt <tiny>",
        command=["python", "train.py", "data.prompt=def f"],
        facts={"parameters": "2,000"},
        results={"validation loss": "3.100", "trigram model": "3.236"},
        tables=["Job\n  ranks  4", "MiCS\n  two-hop  on"],
        series=SERIES,
        references={},
        sample="if a < b & c:",
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "gpt &lt;tiny&gt;" in page
    assert "python train.py &#x27;data.prompt=def f&#x27;" in page
    assert "if a &lt; b &amp; c:" in page
    assert "<td>trigram model</td><td>3.236</td>" in page
    assert "<pre>MiCS\n  two-hop  on</pre>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page
