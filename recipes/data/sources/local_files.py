"""Files on this machine or on a file system that all nodes share, as a source of text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.data.sources.file_patterns import file_facts, matching_files
from recipes.data.sources.text_readers import read_documents
from recipes.data.sources.text_source import Piece


class LocalFiles:
    """Text files (each a document), JSON lines and parquet files (each row a document); the suffix decides.

    Args:
        files: Paths or patterns.
        field: Column with the text, in files with rows.
        val_files: Paths or patterns of the held-out files; None holds out a part of the documents of ``files``. A file
            that both name is held out.
        encoding_errors: ``"strict"`` rejects text files that are not UTF-8, ``"replace"`` puts U+FFFD for other bytes.
        name: Short name of the source.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If no file has any content.
    """

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        field: str = "text",
        val_files: str | Sequence[str] | None = None,
        encoding_errors: str = "strict",
        name: str = "local",
    ) -> None:
        self.name = name
        self.has_val = val_files is not None
        self._field = field
        self._encoding_errors = encoding_errors
        val = [] if val_files is None else matching_files(val_files, key="data.source.val_files")
        train = [path for path in matching_files(files, key="data.source.files") if path not in set(val)]
        self._files = {"train": train, "val": val}
        for key in ("files", "val_files") if self.has_val else ("files",):
            _reject_empty(self._files["val" if key == "val_files" else "train"], key=f"data.source.{key}")
        # relative names, so that documents stay in their split when the common folder is moved
        self._folder = Path(os.path.commonpath([path.parent for path in train + val]))

    def facts(self) -> Any:
        splits = {split: file_facts(paths) for split, paths in self._files.items()}
        return [splits, self._field, self._encoding_errors]

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for paths in self._files.values() for path in paths)

    def pieces(self, split: str) -> Iterator[Piece]:
        for path in self._files[split]:
            name = path.relative_to(self._folder).as_posix()
            yield from read_documents(path, name=name, field=self._field, encoding_errors=self._encoding_errors)


def _reject_empty(paths: Sequence[Path], *, key: str) -> None:
    if not any(path.stat().st_size for path in paths):
        raise ValueError(f"{key}: the {len(paths)} files it leaves are empty; name files that hold text")
