"""Processes of a part: several ranks on one device, or one rank alone."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def context_of(device: str) -> Any:
    """How processes start: forked for CPUs, where that saves seconds; CUDA does not survive a fork."""
    return multiprocessing.get_context("spawn" if device == "cuda" else "fork")


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, device: str, timeout: float = 240
) -> list[Any]:
    """Call ``function(*args)`` on ranks that talk over gloo, all on the same device; returns what each returned.

    Args:
        world_size: Number of ranks.
        function: What each rank runs; it and its result must pickle.
        args: Arguments of the function.
        device: ``"cuda"`` or ``"cpu"``.
        timeout: Seconds until the ranks are killed.

    Raises:
        RuntimeError: If a rank raised, died or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(device)
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, function, args, device, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        for process in ranks:
            if process.is_alive():
                process.kill()
        results = [Path(folder, f"result-{rank}") for rank in range(world_size)]
        found = [pickle.loads(path.read_bytes()) if path.exists() else (False, "died") for path in results]
    for rank, (ok, value) in enumerate(found):
        if not ok:
            raise RuntimeError(f"rank {rank}: {value}")
    return [value for _, value in found]


def _rank(rank: int, world_size: int, function: Any, args: Any, device: str, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(0)
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        outcome: tuple[bool, Any] = True, function(*args)
    except BaseException as error:
        traceback.print_exc()
        outcome = False, f"{type(error).__name__}: {error}"
    Path(folder, f"part-{rank}").write_bytes(pickle.dumps(outcome))
    Path(folder, f"part-{rank}").rename(Path(folder, f"result-{rank}"))
    os._exit(0)


@contextmanager
def alone(device: str) -> Iterator[None]:
    """Be the only rank of a job, over NCCL on a GPU, with gloo for the CPU, as the Trainer would start it."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        if device == "cuda":
            here = torch.device("cuda", 0)
            torch.cuda.set_device(here)
            dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=here)
        else:
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def torchrun_of_one() -> None:
    """Let Lightning find a job of one rank, which has started already or which it starts itself."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", GROUP_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0", TORCHELASTIC_RUN_ID="alone",
    )  # fmt: skip


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
