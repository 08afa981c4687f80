from __future__ import annotations

from pathlib import Path

import pytest

from recipes import stdlib_text
from recipes.stdlib_text import StdlibText, is_held_out, source_files


def test_one_file_in_ten_is_held_out_and_tests_are_not_text() -> None:
    files = source_files()
    held_out = [path for path in files if is_held_out(path)]
    assert 0.05 < len(held_out) / len(files) < 0.15
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)


def test_data_are_prepared_once_and_splits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = source_files()[:15] + [path for path in source_files() if is_held_out(path)][:3]
    monkeypatch.setattr(stdlib_text, "source_files", lambda: few)
    data = StdlibText(
        vocab_size=300,
        sequence_length=32,
        batch_size=2,
        val_batch_size=4,
        val_windows=8,
        prompt="def f",
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    written = {path: path.stat().st_mtime_ns for path in data.folder.iterdir()}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in data.folder.iterdir()} == written
    data.setup("fit")
    assert len(data.val) == 8
    assert len(data.train) > 8
    assert data.decode(data.predict_dataloader().dataset[0]) == "def f"


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"found no \.py files of the standard library"):
        source_files()
