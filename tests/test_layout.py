"""Files and folders of the package stay small enough to be read at once."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_mics"
MOST_LINES = 400
MOST_FILES = 15  # in a folder, its __init__ apart


def test_no_file_is_too_long() -> None:
    lines = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lines) > 50
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    modules = {folder: [path for path in folder.glob("*.py") if path.stem != "__init__"] for folder in folders}
    assert {folder.name: len(files) for folder, files in modules.items() if len(files) > MOST_FILES} == {}
