"""Run a function on several forked ranks that talk over gloo, and hand back what each returned.

Forking costs a fraction of a second where spawning costs tens of seconds; gloo allows it, CUDA does not.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """At least one rank raised or died; carries the exceptions' types and messages by rank."""

    def __init__(self, failures: dict[int, tuple[str, str, str]]) -> None:
        self.failures = {rank: (kind, message) for rank, (kind, message, _) in failures.items()}
        super().__init__("\n".join(f"--- rank {rank}:\n{trace}" for rank, (_, _, trace) in sorted(failures.items())))


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 180,
    init_group: bool = True,
    env: Callable[[int], dict[str, str]] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks and return their results in the order of ranks.

    Args:
        world_size: Ranks to fork.
        function: What each rank runs; the result must pickle.
        args: For ``function``.
        timeout: Seconds after which the ranks are killed.
        init_group: Whether to make the default process group first.
        env: Environment variables for a rank.

    Raises:
        RankError: If a rank raised, died, or was killed for taking too long.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store") if init_group else None
        ends: dict[Connection, int] = {}
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world_size, store, sender, function, args, env(rank) if env else {})
            process = context.Process(target=_rank_main, args=arguments)
            process.start()
            sender.close()
            ends[receiver] = rank
            ranks.append(process)
        results = _collect(ends, timeout)
        for process in ranks:
            if len(results) < world_size or not all(ok for ok, _ in results.values()):
                process.kill()
            process.join()
    failures = {rank: value for rank, (ok, value) in results.items() if not ok}
    for rank in range(world_size):
        if rank not in results:
            failures[rank] = ("Timeout", "", f"no result within {timeout} s, or the process died")
    if failures:
        raise RankError(failures)
    return [results[rank][1] for rank in range(world_size)]


def run_cases(world_size: int, cases: Mapping[Any, Callable[[], Any]], **options: Any) -> dict[Any, list[Any]]:
    """Call several functions one after the other on the same ranks, which are forked once.

    Args:
        world_size: Ranks to fork.
        cases: Functions by the names of their cases.
        options: Options of :func:`run_ranks`.

    Returns:
        By case the results in the order of ranks.
    """
    of_ranks = run_ranks(world_size, _run_all, cases, **options)
    return {case: [results[case] for results in of_ranks] for case in cases}


def _run_all(cases: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    return {name: case() for name, case in cases.items()}


def _collect(ends: dict[Connection, int], timeout: float) -> dict[int, tuple[bool, Any]]:
    deadline, grace = time.monotonic() + timeout, 10.0
    results: dict[int, tuple[bool, Any]] = {}
    waiting = set(ends)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for end in wait(list(waiting), timeout=left):
            waiting.discard(end)
            try:
                results[ends[end]] = pickle.loads(end.recv_bytes())
            except EOFError:
                continue
            if not results[ends[end]][0]:  # one failed: the others get a moment to fail by themselves
                deadline = min(deadline, time.monotonic() + grace)
    return results


def _rank_main(
    rank: int, world_size: int, store: Path | None, sender: Connection, function: Any, args: Any, env: dict[str, str]
) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
        result = (True, function(*args))
    except BaseException as error:
        result = (False, (type(error).__name__, str(error), traceback.format_exc()))
    sender.send_bytes(pickle.dumps(result))  # plain pickle: torch's own would share memory with a process that ends
    sender.close()
    os._exit(0)  # skips the parent's exit handlers
