"""Progress bars for checkpoints: where something takes long, on one rank, and as the Trainer's own bar."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_mics.checkpoint.storage import progress
from tests.support.fits import AdamModule, fit
from tests.support.trainers import on_ranks


def _bars(text: str) -> set[str]:
    return {f"{verb} {name}" for verb, name in re.findall(r"(saving|checking|loading) (\S+):", text)}


def _save_and_load(folder: Path, delay_seconds: float, enabled: bool) -> set[str]:
    """Which bars this rank shows."""
    progress.DELAY_SECONDS = delay_seconds
    shown = io.StringIO()
    options: dict[str, Any] = {"enable_progress_bar": enabled, "callbacks": [TQDMProgressBar()] if enabled else []}
    with contextlib.redirect_stderr(shown):
        trainer, _ = fit(folder, AdamModule, **options)
        trainer.save_checkpoint(folder / "a.ckpt")
        fit(folder, AdamModule, ckpt_path=folder / "a.ckpt", epochs=2, **options)
    return _bars(shown.getvalue())


def test_one_rank_shows_what_takes_long(tmp_path: Path) -> None:
    first, second = on_ranks(_save_and_load, tmp_path, 0.0, True, world_size=2)
    assert first == {"saving a.ckpt", "checking a.ckpt", "loading a.ckpt"}
    assert second == set()


@pytest.mark.parametrize(("delay_seconds", "enabled"), [(60.0, True), (0.0, False)], ids=["short", "no progress bar"])
def test_nothing_is_shown_for_what_is_short_or_where_the_trainer_shows_nothing(
    tmp_path: Path, delay_seconds: float, enabled: bool
) -> None:
    assert on_ranks(_save_and_load, tmp_path, delay_seconds, enabled, world_size=2) == [set(), set()]
