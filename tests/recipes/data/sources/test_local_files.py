from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.sources.local_files import LocalFiles
from recipes.data.sources.stdlib_text import source_files, stdlib_text
from recipes.data.sources.text_source import PIECE_CHARACTERS

TEXTS = ["first größer", "second\nline", "third"]


def write_text(folder: Path) -> str:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def write_json_lines(folder: Path) -> str:
    rows = [json.dumps({"body": text, "id": 1}) for text in [*TEXTS, "", None]]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    return str(folder / "rows.jsonl")


def write_parquet(folder: Path) -> str:
    pq.write_table(pa.table({"body": [*TEXTS, "", None], "id": range(5)}), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def documents(source: LocalFiles, split: str = "train") -> list[str]:
    whole = [""]
    for piece in source.pieces(split):
        assert piece["text"]
        whole[-1] += piece["text"]
        if piece["ends"]:
            whole.append("")
    assert whole.pop() == ""
    return whole


@pytest.mark.parametrize("write", [write_text, write_json_lines, write_parquet])
def test_documents_come_as_they_were_written_and_without_empty_ones(tmp_path: Path, write: Any) -> None:
    source = LocalFiles(files=write(tmp_path), field="body")
    assert documents(source) == TEXTS
    assert source.total_bytes() == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_long_text_comes_in_pieces_that_end_with_lines(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(PIECE_CHARACTERS // 4)) + "x" * 3 * PIECE_CHARACTERS
    (tmp_path / "long.txt").write_text(text)
    source = LocalFiles(files=str(tmp_path / "long.txt"))
    pieces = list(source.pieces("train"))
    assert documents(source) == [text]
    assert len(pieces) >= 4 and max(len(piece["text"]) for piece in pieces) <= 2 * PIECE_CHARACTERS
    assert pieces[0]["text"].endswith("\n")
    assert {piece["document"] for piece in pieces} == {"long.txt"}


def test_named_files_are_held_out_and_not_trained_on(tmp_path: Path) -> None:
    write_text(tmp_path)
    source = LocalFiles(files=[str(tmp_path / "*.txt")], val_files=str(tmp_path / "1.txt"))
    assert documents(source, "train") == [TEXTS[0], TEXTS[2]]
    assert documents(source, "val") == [TEXTS[1]]


def test_facts_tell_a_changed_file(tmp_path: Path) -> None:
    pattern = write_text(tmp_path)
    before = LocalFiles(files=pattern).facts()
    assert LocalFiles(files=pattern).facts() == before
    (tmp_path / "1.txt").write_text("changed")
    assert LocalFiles(files=pattern).facts() != before


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("no*.txt", {}, r"data\.source\.files=.*no\*\.txt matches no file; looked in"),
        (".", {}, r"it is a folder: use .*/\*\*/\*\.txt"),
        ("*.txt", {"val_files": "nowhere.txt"}, r"data\.source\.val_files=nowhere\.txt matches no file"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path: Path, files: str, options: dict[str, str], message: str) -> None:
    write_text(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        LocalFiles(files=f"{tmp_path}/{files}", **options)


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.source\.files is empty; name at least one"):
        LocalFiles(files=[])


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full.txt").write_text("text")
    with pytest.raises(ValueError, match=r"data\.source\.files: the 1 files it leaves are empty"):
        LocalFiles(files=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match=r"data\.source\.val_files: the 1 files it leaves are empty"):
        LocalFiles(files=str(tmp_path / "full.txt"), val_files=str(tmp_path / "empty.txt"))


CONTENTS = [
    ("a.txt", b"good\nbad \xff", {}, r"a\.txt is not UTF-8 text \(byte 0xff"),
    ("a.jsonl", b'{"text": "good"}\n{"text": ', {}, r"a\.jsonl, line 2 is not JSON in UTF-8"),
    ("a.jsonl", b'{"text": "\xff"}', {}, r"a\.jsonl, line 1 is not JSON in UTF-8"),
    ("a.jsonl", b'{"b": 1, "a": 2}', {}, r"a\.jsonl, line 1 has no field 'text'; it has a, b; set data\.source\.field"),
    ("a.jsonl", b'["text"]', {}, r"line 1 holds list, not an object with a field 'text'"),
    ("a.jsonl", b'{"n": 3}', {"field": "n"}, r"line 1: field 'n' holds int, not text"),
    ("a.jsonl", b'{"text": "good", "n": 1}\n{"n": "x"}', {}, r"a\.jsonl, line 2 has no field 'text'; it has n"),
    ("a.parquet", b"PAR1 and nothing of it", {}, r"a\.parquet cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), CONTENTS)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, options: dict[str, str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(LocalFiles(files=str(tmp_path / name), **options).pieces("train"))


def test_a_parquet_file_without_the_field_names_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.parquet has no field 'text'; it has body, id"):
        list(LocalFiles(files=write_parquet(tmp_path)).pieces("train"))


def test_a_parquet_file_that_is_corrupted_within_is_named(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path))
    content = bytearray(path.read_bytes())
    content[4:100] = b"\xff" * 96
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet"):
        list(LocalFiles(files=str(path), field="body").pieces("train"))


def test_a_field_that_is_not_text_is_named_in_parquet_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.parquet: field 'id' holds int, not text"):
        list(LocalFiles(files=write_parquet(tmp_path), field="id").pieces("train"))


def test_rows_of_json_lines_may_differ_in_their_other_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "n": 1}\n\n{"n": "x", "m": {"k": []}, "text": "b"}\n{"text": null}'
    )
    (tmp_path / "b.jsonl").write_text('{"text": "c", "o": 2}\n')
    assert documents(LocalFiles(files=f"{tmp_path}/*.jsonl")) == ["a", "b", "c"]


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert documents(LocalFiles(files=str(tmp_path / "a.txt"), encoding_errors="replace")) == ["caf\ufffd"]


def test_the_standard_library_is_there_without_its_tests() -> None:
    files = source_files()
    assert len(files) > 100
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
    assert 0 < stdlib_text().total_bytes() <= sum(path.stat().st_size for path in files)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"found no \.py files of the standard library"):
        source_files()
