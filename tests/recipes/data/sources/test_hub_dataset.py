from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from recipes.data.sources.hub_dataset import HubDataset

ROWS = {"text": ["first", "", "second", None], "id": [1, 2, 3, 4]}


def texts(source: HubDataset, split: str = "train") -> list[str]:
    return [piece["text"] for piece in source.pieces(split)]


def test_a_saved_dataset_is_read_with_or_without_splits(tmp_path: Path) -> None:
    Dataset.from_dict(ROWS).save_to_disk(tmp_path / "plain")
    DatasetDict({"train": Dataset.from_dict(ROWS), "test": Dataset.from_dict({"text": ["held out"]})}).save_to_disk(
        tmp_path / "splits"
    )
    assert texts(HubDataset(path=str(tmp_path / "plain"))) == ["first", "second"]
    source = HubDataset(path=str(tmp_path / "splits"), val_split="test")
    assert (texts(source), texts(source, "val")) == (["first", "second"], ["held out"])
    with pytest.raises(ValueError, match="has no split 'validation'; it has test, train"):
        texts(HubDataset(path=str(tmp_path / "splits"), split="validation"))
    with pytest.raises(ValueError, match=r"saved without splits: use data\.source\.split=train, not 'test'"):
        texts(HubDataset(path=str(tmp_path / "plain"), split="test"))
    with pytest.raises(ValueError, match=r"split train has no field 'body'; it has id, text; set data\.source\.field"):
        texts(HubDataset(path=str(tmp_path / "plain"), field="body"))


def test_a_folder_of_files_is_read(tmp_path: Path) -> None:
    for split, text in (("train", "to train on"), ("validation", "held out")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    source = HubDataset(path=str(tmp_path), val_split="validation")
    assert (texts(source), texts(source, "val")) == (["to train on"], ["held out"])


def test_facts_tell_a_changed_folder(tmp_path: Path) -> None:
    Dataset.from_dict(ROWS).save_to_disk(tmp_path / "a")
    before = HubDataset(path=str(tmp_path / "a")).facts()
    (tmp_path / "a" / "more").write_text("text")
    assert HubDataset(path=str(tmp_path / "a")).facts() != before


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path=\./nowhere: there is no such folder"):
        HubDataset(path="./nowhere")


def test_a_name_is_streamed_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        if options["split"] == "none":
            raise DatasetNotFoundError("no such dataset")
        return Dataset.from_dict(ROWS).to_iterable_dataset()

    monkeypatch.setattr("recipes.data.sources.hub_dataset.load_dataset", load)
    assert texts(HubDataset(path="someone/texts", subset="en", revision="abc")) == ["first", "second"]
    assert asked == [("someone/texts", {"split": "train", "streaming": True, "name": "en", "revision": "abc"})]
    with pytest.raises(ValueError, match=r"path=someone/texts \(subset=None, split=none\) cannot be opened: no such"):
        texts(HubDataset(path="someone/texts", split="none"))
