"""Every test that a table of behaviors names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TABLES = "".join(
    (ROOT / "docs" / name).read_text()
    for name in ("behaviors/lightning.md", "behaviors/integrations.md", "what-works.md")
)


NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLES)))


def test_the_table_names_tests():
    assert len(NAMED) > 50


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_named_tests_exist(file):
    defined = set(re.findall(r"def (test_\w+)", (ROOT / file).read_text()))
    assert {name for named_in, name in NAMED if named_in == file} <= defined
