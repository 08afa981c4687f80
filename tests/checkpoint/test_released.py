"""Checkpoints of each release load, in each format, and losses are those that were recorded beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.released.make import FOLDER, FORMATS, RANKS, losses
from tests.support.trainers import on_ranks

RELEASES = sorted(folder.name for folder in FOLDER.iterdir() if (folder / "losses.json").is_file())
OTHER_RANKS = 3


def load_all(folder: Path, names: list[str]) -> dict[str, list[float]]:
    return {name: losses(name, folder / name, save=False) for name in names}


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The losses that were recorded, and those after loading; on other ranks where ranks draw no random numbers."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in FORMATS:
        shutil.unpack_archive(FOLDER / request.param / f"{name}.tar.gz", folder)
    of_trainer = [name for name in FORMATS if name.startswith("trainer")]  # noise of each rank is in the losses
    others = [name for name in FORMATS if name not in of_trainer]
    return {
        "recorded": json.loads((FOLDER / request.param / "losses.json").read_text()),
        **on_ranks(load_all, folder, of_trainer, world_size=RANKS)[0],
        **on_ranks(load_all, folder, others, world_size=OTHER_RANKS)[0],
    }


@pytest.mark.parametrize("name", FORMATS)
def test_losses_are_those_that_were_recorded_when_the_checkpoint_was_saved(release: dict[str, Any], name: str) -> None:
    assert release[name] == pytest.approx(release["recorded"][name], rel=0, abs=1e-5)


def test_this_release_is_there_and_small() -> None:
    assert "0.1.0" in RELEASES
    for release in RELEASES:
        assert sum(file.stat().st_size for file in (FOLDER / release).iterdir()) < 150_000
