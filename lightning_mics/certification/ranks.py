"""Forked ranks on this machine that communicate over gloo.

Forking costs a fraction of a second where starting an interpreter costs many: the ranks inherit all that is imported.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from lightning_mics._torch.accelerator import use_no_accelerator
from lightning_mics.in_memory.orphans import end_with

GRACE = 10.0  # seconds for the other ranks to fail by themselves, after the first has
T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What became of a rank.

    Attributes:
        value: Result of the function; None if it raised.
        error: Class and message of the exception; empty if it returned.
        trace: Traceback of the exception, and the last output of the rank.
        died: Whether the process has ended by itself without an answer.
    """

    value: T | None = None
    error: str = ""
    trace: str = ""
    died: bool = False


def on_ranks(world_size: int, function: Callable[[], T], *, seconds: float) -> list[Answer[T]]:
    """Call a function on forked ranks that look to Lightning as if torchrun had started them.

    Args:
        world_size: Number of ranks.
        function: Function without arguments, called on each rank; its result must pickle.
        seconds: Time after which ranks are killed.

    Returns:
        The answers, by rank.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        ends: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target = (rank, world_size, Path(folder), sender, function, os.getpid())
            processes.append(context.Process(target=_run_rank, args=target, daemon=True))
            processes[-1].start()
            sender.close()
            ends[receiver] = rank
        found = _collect(ends, seconds)
        for process in processes:
            if len(found) < world_size or any(answer.error for answer in found.values()):
                process.kill()
            process.join()
        silent = f"no answer within {seconds:g} s"
        return [
            found.get(rank) or Answer(error=silent, trace=_output_of(Path(folder), rank)) for rank in range(world_size)
        ]


def _collect(ends: dict[Connection, int], seconds: float) -> dict[int, Answer[Any]]:
    deadline = time.monotonic() + seconds
    found: dict[int, Answer[Any]] = {}
    waiting = set(ends)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for end in wait(list(waiting), timeout=left):
            assert isinstance(end, Connection)
            waiting.discard(end)
            try:
                found[ends[end]] = pickle.loads(end.recv_bytes())
            except EOFError:
                found[ends[end]] = Answer(error=f"the process of rank {ends[end]} has died", died=True)
                deadline = min(deadline, time.monotonic() + GRACE)
                continue
            if found[ends[end]].error:
                deadline = min(deadline, time.monotonic() + GRACE)
    return found


def _run_rank(
    rank: int, world_size: int, folder: Path, sender: Connection, function: Callable[[], Any], parent: int
) -> None:
    end_with(parent)
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _prepare(rank, world_size, folder)
        answer = Answer(value=function())
        content = pickle.dumps(answer)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        content = pickle.dumps(Answer(error=said, trace=traceback.format_exc() + _output_of(folder, rank)))
    sender.send_bytes(content)
    sender.close()
    os._exit(0)  # without the exit handlers of the process that has forked it


def _prepare(rank: int, world_size: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # unused: the ranks have met before Lightning starts
        TORCHELASTIC_RUN_ID="certify",
    )
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    use_no_accelerator()
    gc.freeze()  # or each collection would visit, and so copy, what the rank shares with the others
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )


def _output_of(folder: Path, rank: int, *, most: int = 2000) -> str:
    log = folder / f"rank-{rank}.log"
    return log.read_text(errors="replace")[-most:] if log.exists() else ""
