from __future__ import annotations

from pathlib import Path

import torch

from recipes.callbacks.peak_memory import PeakMemory, peak_memory_bytes
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer, on_ranks


def _memory(folder: str) -> tuple[float, float, float]:
    before = peak_memory_bytes(torch.device("cpu")) / 2**30
    trainer = make_trainer(folder, callbacks=[PeakMemory()], log_every_n_steps=1, max_steps=1)
    trainer.fit(TinyModule(), loader(16))
    metrics = trainer.callback_metrics
    return before, metrics["least_peak_memory_gib"].item(), metrics["peak_memory_gib"].item()


def test_peak_memory_is_between_the_ranks_that_took_least_and_most(tmp_path: Path) -> None:
    results = on_ranks(_memory, str(tmp_path))
    assert len({result[1:] for result in results}) == 1
    _, least, most = results[0]
    assert 0.01 < min(before for before, *_ in results) <= least <= most < 100
