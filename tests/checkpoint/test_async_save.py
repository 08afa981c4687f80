"""Asynchronous saving: what waits for what, and what a failure stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_mics.checkpoint.async_save import MOST_UNFINISHED, BackgroundSaving, ShardedSaving
from lightning_mics.checkpoint.dcp.save_planner import HostBuffers
from tests.support.checkpoints import is_same, load_into, sharded_model, weights_of
from tests.support.forked import run_ranks


class Writes:
    """Saves that end only when they are told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.buffers: list[HostBuffers] = []
        self.may_end = threading.Event()

    def prepare(self, name: str, *, fails: bool = False) -> Callable[[HostBuffers], Callable[[], None]]:
        def take(buffers: HostBuffers) -> Callable[[], None]:
            self.buffers.append(buffers)
            return write

        def write() -> None:
            assert self.may_end.wait(timeout=60)
            if fails:
                raise OSError(28, "No space left on device")
            self.done.append(name)

        return take


def test_a_save_returns_before_it_is_written_and_waiting_sees_it_done() -> None:
    saving, writes = BackgroundSaving(), Writes()
    saving.save("one", writes.prepare("one"))
    assert writes.done == []
    writes.may_end.set()
    saving.wait()
    assert writes.done == ["one"]


def test_no_more_copies_are_taken_while_as_many_saves_are_unfinished() -> None:
    saving, writes = BackgroundSaving(), Writes()
    for number in range(MOST_UNFINISHED):
        saving.save(str(number), writes.prepare(str(number)))
    next_save = threading.Thread(target=lambda: saving.save("next", writes.prepare("next")))
    next_save.start()
    assert len(writes.buffers) == MOST_UNFINISHED
    writes.may_end.set()
    next_save.join(timeout=60)
    saving.wait()
    assert writes.done == [*map(str, range(MOST_UNFINISHED)), "next"]
    assert len(writes.buffers) == MOST_UNFINISHED + 1


def test_copies_go_to_the_same_memory_once_it_is_free() -> None:
    saving, writes = BackgroundSaving(), Writes()
    writes.may_end.set()
    for name in ("one", "two"):
        saving.save(name, writes.prepare(name))
        saving.wait()
    assert writes.buffers[0] is writes.buffers[1]


def test_what_comes_after_saves_waits_for_them_and_is_done_at_once_without_any() -> None:
    saving, writes = BackgroundSaving(), Writes()
    saving.after_saves(lambda: writes.done.append("nothing to wait for"))
    assert writes.done == ["nothing to wait for"]
    saving.save("one", writes.prepare("one"))
    saving.after_saves(lambda: writes.done.append("after"))
    assert writes.done == ["nothing to wait for"]
    writes.may_end.set()
    saving.wait()
    assert writes.done == ["nothing to wait for", "one", "after"]


def test_a_failure_is_raised_by_name_and_nothing_is_removed_after_it() -> None:
    saving, writes = BackgroundSaving(), Writes()
    saving.save("step_3.ckpt", writes.prepare("", fails=True))
    saving.after_saves(lambda: writes.done.append("removed"))
    writes.may_end.set()
    with pytest.raises(RuntimeError, match=r"saving checkpoint step_3.ckpt asynchronously failed: .*No space left"):
        saving.wait()
    saving.wait()  # once is enough
    assert writes.done == []


def test_a_failure_is_raised_by_the_save_that_must_wait_for_it() -> None:
    saving, writes = BackgroundSaving(), Writes()
    saving.save("bad", writes.prepare("", fails=True))
    for number in range(MOST_UNFINISHED - 1):
        saving.save(str(number), writes.prepare(str(number)))
    writes.may_end.set()
    with pytest.raises(RuntimeError, match="checkpoint bad"):
        saving.save("next", writes.prepare("next"))


class _OnTheFirstGPUError(Exception):
    pass


def _saved_where_cuda_is_available(folder: Path) -> dict[str, Any]:
    model, facts = sharded_model(), {}
    loader = patch.object(
        filesystem, "_OverlappingCpuLoader", side_effect=_OnTheFirstGPUError("a stream of the device")
    )
    for name, synchronous in (("copies", False), ("tensors", True)):
        saving = ShardedSaving(asynchronous=True, timeout=None)
        with patch("torch.cuda.is_available", return_value=True), loader:
            try:
                saving.save(
                    folder / name,
                    model_state=get_model_state_dict(model),
                    optimizer_states=[],
                    meta={},
                    synchronous=synchronous,
                )
                saving.wait()
                facts[name] = "saved"
            except Exception as error:
                facts[name] = str(error)
    loaded = sharded_model(seed=1)
    load_into(folder / "copies", loaded)
    facts["same"] = is_same(weights_of(loaded), weights_of(model))
    return facts


def test_the_thread_that_writes_copies_uses_no_stream_of_a_device(tmp_path: Path) -> None:
    for facts in run_ranks(2, _saved_where_cuda_is_available, tmp_path):
        assert facts["copies"] == "saved" and facts["same"]
        assert "a stream of the device" in facts["tensors"]  # so that the loader is what torch would take
