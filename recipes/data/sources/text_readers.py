"""Reading documents from text files, JSON lines and parquet, a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.data.sources.text_source import PIECE_CHARACTERS, Piece

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}


LONGEST_LINE_REST = 2**16  # a piece ends with a line, unless a line is longer than this


def read_documents(path: Path, *, name: str, field: str, encoding_errors: str) -> Iterator[Piece]:
    """The documents of a file: each row of JSON lines or parquet, or the file itself if it is of any other kind.

    Args:
        path: Its suffix says its kind.
        name: Of the document, if the file is one.
        field: Of a row that has the text.
        encoding_errors: What to do about bytes that are not UTF-8, as ``open`` has it.

    Raises:
        ValueError: If it is not what its suffix says, or rows have no such field, or text is not UTF-8.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, field=field)
    elif path.suffix in JSON_SUFFIXES:
        yield from _read_json_lines(path, field=field)
    else:
        yield from _read_text(path, name=name, encoding_errors=encoding_errors)


def text_of(row: Any, *, field: str, where: str) -> str:
    """The text of a row, empty if it has none.

    Raises:
        ValueError: If there is no such field, or something else in it than text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds {type(row).__name__}, not an object with a field {field!r}")
    check_field(field, row, where=where)
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} holds {type(text).__name__}, not text; set data.source.field")
    return text or ""


def check_field(field: str, fields: Iterable[str], *, where: str) -> None:
    """Raises ValueError if ``field`` is not one of ``fields``."""
    if field not in fields:
        raise ValueError(f"{where} has no field {field!r}; it has {', '.join(sorted(fields))}; set data.source.field")


def _read_text(path: Path, *, name: str, encoding_errors: str) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8", errors=encoding_errors) as file:
            text = _lines(file)
            while text:
                following = _lines(file)
                yield Piece(text, document=name, ends=not following, read_bytes=len(text.encode()))
                text = following
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}); convert it, or use "
            "data.source.encoding_errors=replace"
        ) from error


def _lines(file: TextIO) -> str:
    """Some whole lines, or a part of a line that is very long; empty at the end of the file."""
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
            if text := text_of(row, field=field, where=where):
                yield Piece(text, document=text, read_bytes=len(line))


def _read_parquet(path: Path, *, field: str) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(path) as file:
            check_field(field, file.schema_arrow.names, where=str(path))
            row_bytes = path.stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for row in batch.to_pylist():
                    if text := text_of(row, field=field, where=str(path)):
                        yield Piece(text, document=text, read_bytes=row_bytes)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
