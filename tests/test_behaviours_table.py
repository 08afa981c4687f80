"""Every test that the table of Lightning's behaviours names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "tests/lightning_behaviours.md").read_text())))


def test_the_table_names_tests():
    assert len(NAMED) > 50


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_named_tests_exist(file):
    defined = set(re.findall(r"def (test_\w+)", (ROOT / file).read_text()))
    assert {name for named_in, name in NAMED if named_in == file} <= defined
