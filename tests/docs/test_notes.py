"""Each ``[Note: ...]`` of the package is told once, and referred to by its name.

A line with nothing but the name in brackets begins a note; wherever else the name stands, it refers to it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import lightning_mics

PACKAGE = Path(lightning_mics.__file__).parent


NOTES = {
    "Agreement without waiting": "collectives/control_plane.py",
    "Zero gradients before the boundary": "techniques/pending_gradients.py",
    "Hooks on the root, in order": "sharding/schedule.py",
    "When cached weights are dropped": "sharding/weight_cache.py",
    "How a checkpoint becomes visible": "checkpoint/storage/folder.py",
}


def notes_in(text: str) -> tuple[list[str], list[str]]:
    """The names of the notes that are told in ``text``, and of those that it refers to."""
    told, referred_to = [], []
    for line in text.splitlines():
        names = re.findall(r"\[Note: ([^]]*)", line)
        if re.fullmatch(r"(# )?\[Note: [^]]+\]", line.strip()):
            told += names
        else:
            referred_to += names
    return told, referred_to


@pytest.fixture(scope="module")
def notes() -> dict[str, tuple[list[str], list[str]]]:
    """By file."""
    return {str(file.relative_to(PACKAGE)): notes_in(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def test_every_note_is_told_once_in_its_place(notes):
    told = [(name, file) for file, (names, _) in notes.items() for name in names]
    assert sorted(told) == sorted(NOTES.items())


def test_every_reference_is_to_a_note_that_is_told(notes):
    referred_to = {name for _, names in notes.values() for name in names}
    assert referred_to == set(NOTES)


def test_every_note_is_referred_to_from_several_other_files(notes):
    files = Counter(name for file, (_, names) in notes.items() for name in set(names) if file != NOTES[name])
    assert all(files[name] >= 4 for name in NOTES), files


def test_a_reference_to_nothing_and_a_name_that_is_broken_over_lines_are_found():
    text = "[Note: Told]\n# [Note: Told too]\nsee [Note: Not told], or [Note: Told].\nsee [Note: Broken\nover lines]"
    assert notes_in(text) == (["Told", "Told too"], ["Not told", "Told", "Broken"])
