"""American spelling, and the field's words in place of our own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BRITISH = re.compile(
    r"\b\w*(initialis|tokenis|synchronis|serialis|normalis|optimis|organis|recognis|minimis|maximis|parametris|"
    r"summaris|generalis|emphasis|behaviour|colour|favour|neighbour|artefact|centre|licence)(e|es|ed|er|ers|ing|ation|s)?\b",
    re.IGNORECASE,
)
ALLOWED = {"emphasis"}
OURS = {
    "beside training": "asynchronously",
    "stepped into": "patched",
    "goes before": "takes precedence over",
    "kept copy": "cache",
    "stays behind": "is lost",
    "one and all": "all",
}


def written() -> list[Path]:
    """Files that people read: code, configs and pages, without results and history."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    skipped = (
        "benchmarks/results/",
        "docs/behaviours/",
        "docs/behaviors/",
        "CHANGELOG.md",
        "LICENSE",
        "tests/docs/test_prose.py",
    )
    return [
        ROOT / name
        for name in listed
        if name.endswith((".py", ".md", ".yaml", ".toml")) and not name.startswith(skipped)
    ]


def british(text: str) -> list[str]:
    """Words in British spelling, lower case."""
    return [match[0].lower() for match in BRITISH.finditer(text) if match[0].lower() not in ALLOWED]


def test_spelling_is_american() -> None:
    assert {str(path.relative_to(ROOT)): found for path in written() if (found := british(path.read_text()))} == {}


@pytest.mark.parametrize("phrase", OURS)
def test_words_are_the_fields(phrase: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in written() if phrase in path.read_text().lower()]
    assert found == [], f"say {OURS[phrase]!r}"


def test_what_is_wrong_is_found() -> None:
    assert british("It initialises; tokenised text, its behaviour.") == ["initialises", "tokenised", "behaviour"]
    assert british("An optimizer initializes.") == []
