"""A dataset of the hub, or of ``datasets`` on disk, as a source of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from recipes.data.sources.file_patterns import file_facts
from recipes.data.sources.text_readers import read_rows
from recipes.data.sources.text_source import Piece

MARKS_OF_SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes


class HubDataset:
    """Each row is a document. Rows are streamed, also from the hub, without a copy of the corpus on disk.

    Args:
        path: A name on the hub, a folder that ``save_to_disk`` has made, or a folder of files of a kind
            that ``load_dataset`` knows.
        subset: Name of the subset (configuration), for a dataset that has several.
        split: Split to train on.
        val_split: Split to validate on; None holds out a part of the documents of ``split``.
        field: Column with the text.
        revision: Commit or tag on the hub. Without it, tokens that are already in the cache are used also when the
            dataset has changed on the hub.

    Raises:
        FileNotFoundError: If ``path`` looks like a folder and does not exist.
    """

    def __init__(
        self,
        *,
        path: str,
        subset: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        field: str = "text",
        revision: str | None = None,
    ) -> None:
        self.name = "hub"
        self.has_val = val_split is not None
        self._path = path
        self._folder = Path(path).expanduser().absolute()
        self._options = {"name": subset, "revision": revision}
        self._splits = {"train": split, "val": val_split}
        self._field = field
        if path.startswith(("/", "~", ".")) and not self._folder.is_dir():
            raise FileNotFoundError(f"data.source.path={path}: there is no such folder")

    def facts(self) -> Any:
        folder = self._folder if self._folder.is_dir() else None
        files = file_facts(sorted(path for path in folder.rglob("*") if path.is_file())) if folder else self._path
        return [files, self._options, self._splits, self._field]

    def total_bytes(self) -> None:
        return None

    def pieces(self, split: str) -> Iterator[Piece]:
        name = self._splits[split]
        yield from read_rows(self._open(name), field=self._field, where=f"{self._path}, split {name}")

    def _open(self, split: str) -> Dataset | IterableDataset:
        if any((self._folder / mark).is_file() for mark in MARKS_OF_SAVED):
            return _split_of_saved(self._folder, split)
        path = str(self._folder) if self._folder.is_dir() else self._path
        try:
            return load_dataset(path, split=split, streaming=True, **self._options)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
            raise ValueError(
                f"data.source.path={self._path} (subset={self._options['name']}, split={split}) cannot be "
                f"opened: {error}"
            ) from error


def _split_of_saved(folder: Path, split: str) -> Dataset:
    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(sorted(saved))}")
        return saved[split]
    if split != "train":
        raise ValueError(f"{folder} was saved without splits: use data.source.split=train, not {split!r}")
    return saved
