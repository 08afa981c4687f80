"""The page on saving says what was measured: later saves against Lightning's, and how even the ranks' shares are."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.saving_time import SYSTEMS, write_page


def test_the_page_compares_later_saves_and_ranks(tmp_path: Path) -> None:
    seconds = dict(zip(SYSTEMS, (0.2, 1.0, 2.0, 1.5, 3.0), strict=True))
    measured = [
        {
            "round": 0,
            "system": system,
            "save_seconds": [9.0, later, later],
            "step_seconds": [1.0],
            "start_seconds": [1.0, 1.2],
            "resume_seconds": [1.1 + later, 1.3 + later],
            "written_bytes": [10_000_000, 30_000_000],
            "read_bytes": [20_000_000, 20_000_000],
        }
        for system, later in seconds.items()
    ]
    (tmp_path / "results.json").write_text(json.dumps(measured))
    write_page(tmp_path, ["--rounds", "1"], 1.0, 1)
    page = (tmp_path / "README.md").read_text()
    assert "| mics, async_save | 9.000 (9.000 - 9.000) | 0.200 (0.200 - 0.200) | 0.100 |" in page
    assert "| mics | 9.000 (9.000 - 9.000) | 1.000 (1.000 - 1.000) | 0.500 |" in page
    assert "| mics | 1.100 (1.000 - 1.200) | 2.200 (2.100 - 2.300) | 1.100 (1.000 - 1.200) | 0.52 |" in page
    assert "| mics, one replica | 9.000 (9.000 - 9.000) | 1.500 (1.500 - 1.500) | 0.500 |" in page  # of Lightning's one
    assert "| mics | 10.0, 30.0 | 1.500 | 20.0, 20.0 | 1.000 |" in page
    assert "python -m benchmarks.saving_time --rounds 1\n" in page
