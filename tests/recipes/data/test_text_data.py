from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch

from recipes.data import text_data
from recipes.data.sources.local_files import LocalFiles
from recipes.data.sources.text_source import is_held_out
from recipes.data.text_data import TextData
from tests.support.forked import RankError
from tests.support.small_tokenizers import saved, word_tokenizer
from tests.support.trainers import make_trainer, on_ranks

FORK = multiprocessing.get_context("fork")
WINDOWS = {"sequence_length": 32, "batch_size": 2, "val_batch_size": 4, "val_windows": 8, "prompt": "def f(x, y): pass"}


def corpus(folder: Path, *, files: int = 40) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(0 if any(folder.iterdir()) else files):  # written again, they would count as changed
        lines = [f"def function_{number}_{line}(x):\n    return x + {line}\n" for line in range(20)]
        (folder / f"{number}.py").write_text("".join(lines))
    return f"{folder}/*.py"


def text(folder: Path, **options: Any) -> TextData:
    files = options.pop("files", None) or corpus(folder / "corpus")
    given = {"source": LocalFiles(files=files), "vocab_size": 300, "cache_dir": str(folder / "cache")}
    return TextData(**{**given, **WINDOWS, **options})


def opened(data: TextData) -> TextData:
    data.prepare_data()
    data.setup("validate")
    return data


def test_data_are_prepared_once_and_splits_differ(tmp_path: Path) -> None:
    data = opened(text(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in data.folder.rglob("*") if path.suffix in (".arrow", ".json")}
    assert len(written) >= 3
    again = opened(text(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert again.train_tokens == data.train_tokens
    assert len(data.val) == 8 < len(data.train)
    assert data.val_targets().shape == (8 * 32,)
    assert data.decode(data.predict_dataloader().dataset[0]) == "def f(x, y): pass"
    assert data.tokenizer_folder == data.folder


def test_masked_data_come_from_the_same_tokens(tmp_path: Path) -> None:
    causal, masked = opened(text(tmp_path)), opened(text(tmp_path, objective="masked"))
    assert masked.folder == causal.folder
    sample = masked.train[0]
    assert sample["input_ids"].shape == sample["labels"].shape == (32,)
    prompt = masked.predict_dataloader().dataset[0]
    assert 0 < (prompt == masked.tokenizer.mask_token_id).sum() < len(prompt) / 3
    targets = sum(int((masked.val[index]["labels"] != -100).sum()) for index in range(8))
    assert masked.val_targets().shape == (targets,) and 0 < targets < 0.3 * 8 * 32


def test_the_folder_depends_on_text_tokenizer_and_split(tmp_path: Path) -> None:
    words = saved(word_tokenizer(), tmp_path / "words")
    others = [{"vocab_size": 301}, {"val_fraction": 0.2}, {"tokenizer": words}, {"files": f"{tmp_path}/corpus/1*.py"}]
    files = corpus(tmp_path / "corpus")
    folders = {text(tmp_path, **{"files": files, **options}).folder for options in [{}, {"batch_size": 1}, *others]}
    assert len(folders) == 1 + len(others)


def test_one_document_gives_its_end_for_validation(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus")
    (tmp_path / "one.txt").write_text("".join(path.read_text() for path in (tmp_path / "corpus").iterdir()))
    data = opened(text(tmp_path, files=f"{tmp_path}/one.txt", val_fraction=0.25))
    assert len(data.val_tokens) == pytest.approx(len(data.train_tokens) / 3, rel=0.01)
    assert np.asarray(data.val_tokens)[-1] == data.tokenizer.eos_token_id


def test_if_all_documents_are_held_out_none_is(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    name = next(f"{n}.py" for n in range(100) if is_held_out(f"{n}.py", fraction=0.2))
    content = "".join(f"def function_{line}(x):\n    return x + {line}\n" for line in range(60))
    (folder / name).write_text(content)
    data = opened(text(tmp_path, val_fraction=0.2))
    assert len(data.train_tokens) == pytest.approx(4 * len(data.val_tokens), rel=0.02)
    assert data.decode(torch.tensor(np.concatenate([data.train_tokens, data.val_tokens]))[:-1]) == content


def test_a_named_tokenizer_is_used_and_copied_for_exports(tmp_path: Path) -> None:
    data = opened(text(tmp_path, tokenizer=saved(word_tokenizer(), tmp_path / "words"), vocab_size=80))
    assert len(data.tokenizer) == 65
    assert (data.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, r"data\.vocab_size=100 is less than 259"),
        (
            {"vocab_size": 50, "tokenizer": "words"},
            r"data\.vocab_size=50 is less than the 65 tokens of data\.tokenizer=",
        ),
        ({"tokenizer": "no_mask", "objective": "masked"}, "no_mask has no mask token"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_before_anything_is_prepared(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    saved(word_tokenizer(), tmp_path / "words")
    saved(word_tokenizer(mask=False), tmp_path / "no_mask")
    if "tokenizer" in options:
        options = {**options, "tokenizer": str(tmp_path / options["tokenizer"])}
    with pytest.raises(ValueError, match=message):
        text(tmp_path, **options)
    assert not (tmp_path / "cache").exists()


def test_too_little_text_for_a_window_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words and no more than that, far from a window")
    with pytest.raises(ValueError, match=r"the validation text has \d tokens, too few for one window of 32 \+ 1"):
        opened(text(tmp_path, files=f"{tmp_path}/short.txt"))


def test_a_folder_that_another_machine_has_prepared_is_missed(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"does not exist, though it was prepared: do all nodes see the same source"
    ):
        text(tmp_path).setup("fit")


def test_two_jobs_of_four_ranks_at_once_tokenize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = text_data.token_rows
    started, made, files = FORK.Barrier(8), FORK.Value("i", 0), corpus(tmp_path / "corpus")

    def counted(*arguments: Any, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        with made:
            made.value += 1
        yield from make(*arguments, **options)

    def rank() -> None:
        started.wait()
        data = opened(text(tmp_path, files=files))
        assert np.asarray(data.train_tokens).max() < 300 and len(data.val) == 8

    monkeypatch.setattr(text_data, "token_rows", counted)
    ranks = [FORK.Process(target=rank) for _ in range(8)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 8
    assert made.value == 1


def rows_of(_source: Any, **_options: Any) -> Iterator[dict[str, np.ndarray]]:
    yield from ({"train": np.full(100, 7, dtype=np.uint16), "val": np.full(100, 8, dtype=np.uint16)} for _ in range(9))


def test_who_waits_says_so_and_a_killed_process_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizing, files = FORK.Event(), corpus(tmp_path / "corpus")

    def never_done(*_: Any, **__: Any) -> Iterator[dict[str, np.ndarray]]:
        yield from rows_of(None)
        tokenizing.set()
        FORK.Event().wait()

    monkeypatch.setattr(text_data, "token_rows", never_done)
    holder = FORK.Process(target=lambda: text(tmp_path, files=files).prepare())
    holder.start()
    assert tokenizing.wait(60)
    monkeypatch.setattr(text_data, "token_rows", rows_of)
    waiter = FORK.Process(target=lambda: text(tmp_path, files=files).prepare())
    waiter.start()
    waiter.join(3)
    assert waiter.is_alive()
    holder.kill()
    waiter.join(60)
    assert waiter.exitcode == 0
    assert "does not exist yet: creating it, or waiting for another process that does" in capfd.readouterr().out
    assert np.asarray(opened(text(tmp_path, files=files)).train_tokens).tolist() == [7] * 900


def test_what_fails_leaves_no_tokens_and_the_next_attempt_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[dict[str, np.ndarray]]:
        yield from rows_of(None)
        raise ZeroDivisionError("half-way")

    monkeypatch.setattr(text_data, "token_rows", fail)
    with pytest.raises(ZeroDivisionError, match="half-way"):
        text(tmp_path).prepare()
    assert not list(text(tmp_path).folder.rglob("*.arrow"))
    monkeypatch.setattr(text_data, "token_rows", rows_of)
    assert np.asarray(opened(text(tmp_path)).val_tokens).tolist() == [8] * 900


def test_errors_of_the_file_system_are_raised_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr("datasets.builder.FileLock", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        text(tmp_path).prepare()


@pytest.mark.parametrize("left", [0, 0.1, 0.5, 0.99])
def test_corrupted_tokens_are_not_used(tmp_path: Path, left: float) -> None:
    data = text(tmp_path)
    data.prepare()
    (stored,) = data.folder.rglob("*.arrow")
    stored.write_bytes(stored.read_bytes()[: int(left * stored.stat().st_size)])
    for start in (data.prepare, data.open):
        with pytest.raises(ValueError, match=r"is corrupted \(.*\); delete it to tokenize again"):
            start()


def test_tokens_that_end_between_two_batches_are_not_used(tmp_path: Path) -> None:
    data = text(tmp_path)
    data.prepare()
    (stored,) = data.folder.rglob("*.arrow")
    with pa.ipc.open_stream(stored.read_bytes()) as reader:
        table = reader.read_all()
    with pa.OSFile(str(stored), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 5))
    with pytest.raises(ValueError, match=rf"is corrupted \(5 rows of {len(table)}\)"):
        data.open()


def test_tokens_of_text_that_has_changed_are_not_used(tmp_path: Path) -> None:
    before = opened(text(tmp_path))
    (tmp_path / "corpus" / "0.py").write_text("print('other text')\n" * 50)
    after = opened(text(tmp_path))
    assert after.folder != before.folder
    assert len(after.train_tokens) + len(after.val_tokens) != len(before.train_tokens) + len(before.val_tokens)


class NeverBuilt(L.LightningModule):
    def configure_model(self) -> None:
        raise AssertionError("the model is built though the data are not there")

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.float().sum()


def _fit(folder: Path, options: dict[str, Any]) -> None:
    make_trainer(folder, devices=2).fit(NeverBuilt(), text(folder, **options))


def test_what_fails_where_text_is_prepared_ends_all_ranks_before_the_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RankError) as failure:
        on_ranks(_fit, tmp_path, {"files": f"{tmp_path}/bad.txt"}, world_size=2)
    kinds, messages = zip(*(failure.value.failures[rank] for rank in range(2)), strict=True)
    assert kinds == ("ValueError", "RuntimeError")  # the second has it from the first
    assert all("bad.txt is not UTF-8 text" in message for message in messages)


def test_fewer_windows_than_an_optimizer_step_takes_are_rejected_before_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(RankError) as failure:
        on_ranks(_fit, tmp_path, {"files": corpus(tmp_path / "corpus"), "batch_size": 10000}, world_size=2)
    kinds, messages = zip(*failure.value.failures.values(), strict=True)
    assert kinds == ("ValueError", "ValueError")
    expected = "fewer than the 20000 of one optimizer step (batch_size 10000 x 2 ranks x 1 micro-steps)"
    assert all(expected in message for message in messages)
