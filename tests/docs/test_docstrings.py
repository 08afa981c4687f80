"""Docstring entries stand alone, parameters are described, tensors have shapes."""

from __future__ import annotations

import re

import pytest

from tests.docs.docstrings import ROOT, SHAPE, Documented, documented, of_source

FRAGMENT = re.compile(r"(Of|That|As|Its|Likewise|Whose|In which|By)\b")
TENSOR = re.compile(r"(torch\.)?Tensor( \| None)?$|(list|tuple|Sequence|Iterable)\[(torch\.)?Tensor")


def fragments(item: Documented) -> list[str]:
    """Entries that only make sense after their own name."""
    return [f"{item.place}: {entry.name}: {entry.text}" for entry in item.entries() if FRAGMENT.match(entry.text)]


def undescribed(item: Documented) -> list[str]:
    """Public functions with two parameters or more, or a docstring that names some only."""
    if not item.is_public or item.overrides or len(item.parameters) < 2:
        return []
    named = {entry.name for entry in item.entries() if entry.section == "Args"}
    missing = [name for name in item.parameters if name not in named]
    return [f"{item.place} does not describe {', '.join(missing)}"] if missing else []


def without_shape(item: Documented) -> list[str]:
    """Tensor parameters of public functions without a shape, in the docstring or beside the parameter."""
    if not item.is_public or item.overrides:
        return []
    described = {entry.name for entry in item.entries() if entry.section == "Args" and SHAPE.search(entry.text)}
    tensors = [name for name, annotation in item.parameters.items() if TENSOR.match(annotation)]
    one_line = bool(SHAPE.search(item.docstring)) and len(item.parameters) == 1
    return [f"{item.place}: {name}" for name in tensors if name not in described | item.shapes and not one_line]


@pytest.mark.parametrize("folder", ["lightning_mics", "recipes", "benchmarks", "tests"])
def test_no_entry_completes_its_own_name(folder: str) -> None:
    assert [line for item in documented(ROOT / folder) for line in fragments(item)] == []


def test_public_functions_describe_their_parameters() -> None:
    assert [line for item in documented() for line in undescribed(item)] == []


def test_tensor_parameters_have_shapes() -> None:
    assert [line for item in documented() for line in without_shape(item)] == []


def test_public_names_have_docstrings() -> None:
    silent = [item.place for item in documented() if item.is_public and not (item.docstring or item.overrides)]
    assert [place for place in silent if not place.endswith("__init__.py")] == []


BAD = '''
"""A file."""

from torch import Tensor


def join(left: Tensor, right: Tensor) -> Tensor:
    """Join two.

    Args:
        left: Of the two, the first.
    """


def silent() -> None: ...
'''


def test_what_is_wrong_is_found() -> None:
    items = list(of_source(BAD, "bad.py"))
    assert [line for item in items for line in fragments(item)] == ["bad.py:join: left: Of the two, the first."]
    assert [line for item in items for line in undescribed(item)] == ["bad.py:join does not describe right"]
    assert [line for item in items for line in without_shape(item)] == ["bad.py:join: left", "bad.py:join: right"]
    assert [item.place for item in items if not item.docstring] == ["bad.py:silent"]


def test_there_are_entries_to_check() -> None:
    assert sum(len(item.entries()) for item in documented()) > 500
