from __future__ import annotations

import json
from pathlib import Path

from recipes.history import History, draw
from recipes.report import write_report

SERIES = {
    "train_loss": [(5, 7.0), (10, 6.0)],
    "val_loss": [(10, 6.5)],
    "tokens_per_s": [(5, 1000.0), (10, 1100.0)],
    "lr": [(5, 1e-3), (10, 9e-4)],
}


def test_what_was_noted_survives_a_checkpoint() -> None:
    history, resumed = (History(path="loss.png", every_n_steps=5) for _ in range(2))
    for name, points in SERIES.items():
        for step, value in points:
            history.note(name, step, value)
    resumed.load_state_dict(history.state_dict())
    assert resumed.series == history.series == SERIES
    resumed.note("lr", 15, 8e-4)
    assert history.series == SERIES


def test_a_panel_is_drawn_for_what_was_measured_only() -> None:
    figure = draw(SERIES, [["train_loss", "val_loss"], ["grad_norm"], ["lr"]])
    assert [axes.get_ylabel() for axes in figure.axes] == ["nats per token", "learning rate"]
    losses = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}
    assert losses == {"train_loss": SERIES["train_loss"], "val_loss": SERIES["val_loss"]}


def test_the_report_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    write_report(
        tmp_path / "run" / "report.html",
        title="gpt <tiny>",
        command=["python", "train.py", "data.prompt=def f"],
        facts={"parameters": "2,000"},
        results={"validation loss": "3.100", "trigram model": "3.236"},
        choices="Job\n  ranks  4",
        series=SERIES,
        sample="if a < b & c:",
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "gpt &lt;tiny&gt;" in page
    assert "python train.py &#x27;data.prompt=def f&#x27;" in page
    assert "if a &lt; b &amp; c:" in page
    assert "<td>trigram model</td><td>3.236</td>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert json.dumps(SERIES)  # plain numbers, as a checkpoint needs
