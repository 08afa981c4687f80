"""A manifest says what files were, and what is wrong with them by now."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest

CONTENT = bytes(range(256)) * 8192  # two chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.distcp").write_bytes(CONTENT)
    (tmp_path / "b.distcp").write_bytes(b"")
    files = {name: FileFacts.of(tmp_path / name) for name in ("a.distcp", "b.distcp")}
    Manifest.now(files, world_size=2).write(tmp_path)
    return tmp_path


def test_checksums_are_those_of_sha256sum(folder: Path) -> None:
    facts = Manifest.read(folder).files["a.distcp"]
    assert (facts.size_bytes, facts.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_a_whole_checkpoint_has_no_problems(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.problems(folder) == []
    assert manifest.world_size == 2 and manifest.saved.endswith("+00:00")


def test_each_problem_names_its_file(folder: Path) -> None:
    os.truncate(folder / "a.distcp", 7)
    (folder / "b.distcp").unlink()
    assert Manifest.read(folder).problems(folder) == [f"a.distcp has 7 of {len(CONTENT)} bytes", "b.distcp is missing"]
    assert Manifest.read(folder).problems(folder, ["b.distcp"]) == ["b.distcp is missing"]
    (folder / "a.distcp").write_bytes(CONTENT[::-1])
    assert Manifest.read(folder).problems(folder)[0] == "a.distcp was altered: its checksum is another"


def with_entry(**entry: Any) -> dict[str, Any]:
    return {"format": 1, "world_size": 1, "saved": "", "files": {"x": {"size_bytes": 1, "sha256": "", **entry}}}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        "1e999",
        "{}",
        {"format": 2, "files": {}, "world_size": 1, "saved": ""},
        {"format": 1, "files": [], "world_size": 1, "saved": ""},
        {"format": 1, "files": {}, "world_size": "many", "saved": ""},
        with_entry(size_bytes="1"),
        with_entry(sha256=1),
        with_entry(more=1),
        {**with_entry(), "files": {"../x": {"size_bytes": 1, "sha256": ""}}},
        {**with_entry(), "files": {"/etc/passwd": {"size_bytes": 1, "sha256": ""}}},
    ],
    ids=lambda content: str(content)[:60],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: Any) -> None:
    (folder / MANIFEST_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DamagedCheckpointError, match=MANIFEST_FILE):
        Manifest.read(folder)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedCheckpointError, match=MANIFEST_FILE):
        Manifest.read(folder)


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("elsewhere", ["..", "a/b", "/etc", 7])
def test_a_folder_outside_of_the_checkpoint_is_refused(tmp_path: Path, elsewhere: Any) -> None:
    manifest = Manifest(files={}, world_size=1, saved="", folder="inside")
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path).content(tmp_path) == tmp_path / "inside"
    replace(manifest, folder=elsewhere).write(tmp_path)
    with pytest.raises(DamagedCheckpointError, match="is not a folder of a checkpoint"):
        Manifest.read(tmp_path)
