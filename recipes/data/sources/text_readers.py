"""Reading documents from text files, JSON lines and the rows of ``datasets``, a piece at a time.

Text and JSON lines are read here, because ``load_dataset("text")`` holds a complete document in memory, and
``load_dataset("json")`` needs the same columns in all rows of all files; errors of neither name the file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset

from recipes.data.sources.text_source import PIECE_CHARACTERS, Piece

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}


LONGEST_LINE_REST = 2**16  # a piece ends with a line, unless a line is longer than this


def read_documents(path: Path, *, name: str, field: str, encoding_errors: str) -> Iterator[Piece]:
    """The documents of a file: each row of JSON lines or parquet, or the file itself if it is of any other kind.

    Args:
        path: A file; its suffix decides its kind.
        name: Identity of the document, if the file is one.
        field: Column with the text, if the file has rows.
        encoding_errors: Treatment of bytes that are not UTF-8, as for ``open``.

    Raises:
        ValueError: If the content does not match the suffix, or rows have no such field, or text is not UTF-8.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, field=field)
    elif path.suffix in JSON_SUFFIXES:
        yield from _read_json_lines(path, field=field)
    else:
        yield from _read_text(path, name=name, encoding_errors=encoding_errors)


def read_rows(rows: Dataset | IterableDataset, *, field: str, where: str) -> Iterator[Piece]:
    """The texts in a column of a dataset, each a document; rows without text are left out.

    Args:
        rows: A dataset, mapped or streamed; columns other than ``field`` are not decoded.
        field: Name of the column.
        where: Name of the dataset in errors.

    Raises:
        ValueError: If there is no such column, or it does not hold text.
    """
    if rows.column_names is not None:
        check_field(field, rows.column_names, where=where)
        rows = rows.select_columns([field])
    for row in rows:
        yield from _row(row, field=field, where=where)


def check_field(field: str, fields: Iterable[str], *, where: str) -> None:
    """Check that ``field`` is one of ``fields``.

    Args:
        field: Name of the field with the text.
        fields: Names of the fields that exist.
        where: Name of the data in errors.

    Raises:
        ValueError: If it is not.
    """
    if field not in fields:
        raise ValueError(f"{where} has no field {field!r}; it has {', '.join(sorted(fields))}; set data.source.field")


def _row(row: Any, *, field: str, where: str) -> Iterator[Piece]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds {type(row).__name__}, not an object with a field {field!r}")
    check_field(field, row, where=where)
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} holds {type(text).__name__}, not text; set data.source.field")
    if text:
        yield Piece(text=text, document=text, ends=True)


def _read_text(path: Path, *, name: str, encoding_errors: str) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8", errors=encoding_errors) as file:
            text = _lines(file)
            while text:
                following = _lines(file)
                yield Piece(text=text, document=name, ends=not following)
                text = following
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}); convert it, or use "
            "data.source.encoding_errors=replace"
        ) from error


def _lines(file: TextIO) -> str:
    """Some complete lines, or a part of a line that is very long; empty at the end of the file."""
    return file.read(PIECE_CHARACTERS) + file.readline(LONGEST_LINE_REST)


def _read_json_lines(path: Path, *, field: str) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{where} is not JSON in UTF-8: {error}") from error
            yield from _row(row, field=field, where=where)


def _read_parquet(path: Path, *, field: str) -> Iterator[Piece]:
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from read_rows(rows, field=field, where=str(path))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
