"""A rank that hangs while a checkpoint is saved or loaded: the others say so in time, and earlier checkpoints stay."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lightning_mics import MiCSStrategy
from lightning_mics.checkpoint import inspect
from lightning_mics.checkpoint.errors import SilentRankError, all_ranks_answer
from tests.support.forked import run_ranks
from tests.support.models import TinyModule
from tests.support.trainers import loader, make_trainer

LIMIT = timedelta(seconds=3)


RANKS = 3


class SaveTwice(Callback):
    """Saves twice; the second time one rank stops, as a rank does whose file system does not answer."""

    def __init__(self, folder: Path, *, silent: int, while_writing: bool) -> None:
        self.folder = folder
        self.stops = dist.get_rank() == silent
        self.while_writing = while_writing

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "first.ckpt")
        write = FileSystemWriter.write_data

        def stop_and_write(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return write(*args)

        if self.stops and self.while_writing:
            FileSystemWriter.write_data = stop_and_write  # type: ignore[method-assign]
        trainer.save_checkpoint(self.folder / "first.ckpt")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        again = (self.folder / "first.ckpt").exists()
        dist.barrier()
        if again and self.stops and not self.while_writing:
            os.kill(os.getpid(), signal.SIGSTOP)


def _save(folder: Path, store: Path, silent: int, while_writing: bool) -> list[Any]:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=LIMIT)
    processes: list[Any] = [None] * RANKS
    dist.all_gather_object(processes, os.getpid())
    trainer = make_trainer(
        folder,
        strategy=MiCSStrategy(timeout=LIMIT),
        devices=RANKS,
        callbacks=[SaveTwice(folder, silent=silent, while_writing=while_writing)],
    )
    try:
        trainer.fit(TinyModule(), loader(12))
    except RuntimeError as error:
        os.kill(processes[silent], signal.SIGCONT)
        return [type(error).__name__, str(error)]
    return ["nothing was raised", ""]


def _environment(rank: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "forked"}
    return {**{name: str(value) for name, value in ranks.items()}, **rest}


@pytest.mark.parametrize(("silent", "while_writing"), [(1, False), (0, True), (2, True)])
def test_a_rank_that_hangs_while_saving_is_an_error_and_the_checkpoint_before_stays(
    silent: int, while_writing: bool, tmp_path: Path
) -> None:
    arguments = (tmp_path, tmp_path / "store", silent, while_writing)
    found = run_ranks(RANKS, _save, *arguments, timeout=60, init_group=False, env=_environment)
    for rank in set(range(RANKS)) - {silent}:
        kind, message = found[rank]
        assert kind == "SilentRankError"
        assert message == (
            f"saving {tmp_path / 'first.ckpt'} failed: at least one rank did not answer within timeout=3 s; it hangs "
            f"or has died, so look for the rank that does not report this error (rank {silent} does not answer: it has "
            "died, is stopped, or its node cannot be reached). Checkpoints that were complete before are unchanged. If "
            "ranks need longer than that, give the strategy a larger timeout"
        )
    assert inspect.main([str(tmp_path / "first.ckpt")]) == 0


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), all_ranks_answer("saving", timeout=None):
        raise RuntimeError("something else")


def test_without_a_timeout_of_its_own_the_message_names_torchs() -> None:
    with pytest.raises(SilentRankError, match=r"loading X failed: .* torch's default timeout;"):  # noqa: SIM117
        with all_ranks_answer("loading X", timeout=None):
            raise dist.DistBackendError("a collective was given up")
