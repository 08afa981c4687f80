"""Run a function on several forked ranks that talk over gloo, and hand back what each returned.

Forking costs a fraction of a second where spawning costs tens of seconds; gloo allows it, CUDA does not.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics._torch.accelerator import use_no_accelerator
from lightning_mics._torch.units.direct_use import combining_operations

combining_operations()  # here, for all ranks that are forked

Run = Callable[..., list[Any]]


GRACE = 10.0
"""Seconds that the other ranks get to fail by themselves."""
JOINS = 3
"""How often ranks are forked where they cannot join one process group: nothing that is tested has begun by then."""


class NotJoinedError(Exception):
    """A rank could not join the process group."""


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
    return _joined(partial(_run_forked, world_size, function, args, timeout, init_group, env))


def _run_forked(
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    init_group: bool,
    env: Callable[[int], dict[str, str]] | None,
) -> list[Any]:
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
        missing = _missing(results, ranks, timeout)
        for process in ranks:
            if len(results) < world_size or not all(ok for ok, _ in results.values()):
                process.kill()
            process.join()
    return _values(results, missing)


def _joined(forked: Callable[[], list[Any]]) -> list[Any]:
    """What ``forked`` returns, forked anew where its ranks could not join one process group."""
    for _ in range(JOINS - 1):
        try:
            return forked()
        except RankError as error:
            if not any(kind == NotJoinedError.__name__ for kind, _ in error.failures.values()):
                raise
            warnings.warn(f"the ranks are forked anew: {error}", stacklevel=2)
    return forked()


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


class SharedRanks:
    """Ranks that stay: each call runs on the same processes, which are forked at the first and after a failure.

    Functions and their arguments are pickled, and patches that the caller has made since the fork are not there. The
    environment, the working directory and torch's seed are the same at the beginning of each call.

    Args:
        world_size: Ranks to fork.
        env: Environment variables for a rank.
    """

    def __init__(self, world_size: int, env: Callable[[int], dict[str, str]] | None = None) -> None:
        self._world_size, self._env = world_size, env
        self._processes: list[Any] = []
        self._requests: list[Connection] = []
        self._ends: dict[Connection, int] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """As :func:`run_ranks`."""
        request = pickle.dumps((function, args))
        return _joined(partial(self._run, request, timeout))

    def _run(self, request: bytes, timeout: float) -> list[Any]:
        if not self._processes:
            self._fork()
        for end in self._requests:
            end.send_bytes(request)
        results = _collect(self._ends, timeout)
        missing = _missing(results, self._processes, timeout)
        if len(results) < self._world_size or not all(ok for ok, _ in results.values()):
            self.close()
        return _values(results, missing)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._requests, self._ends = [], [], {}
        if self._folder is not None:
            self._folder.cleanup()

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self._world_size):
            receiver, sender = context.Pipe(duplex=False)
            requests, ours = context.Pipe(duplex=False)
            env = self._env(rank) if self._env else {}
            arguments = (rank, self._world_size, Path(self._folder.name, "store"), sender, requests, env)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            sender.close()
            requests.close()
            self._ends[receiver] = rank
            self._requests.append(ours)
            self._processes.append(process)


def _serve(
    rank: int, world_size: int, store: Path, sender: Connection, requests: Connection, env: dict[str, str]
) -> None:
    def run(request: bytes) -> Any:
        if not dist.is_initialized():
            _join(rank, world_size, store)
        function, args = pickle.loads(request)
        torch.manual_seed(0)
        return function(*args)

    _prepare(env)
    environment, directory, caller = dict(os.environ), Path.cwd(), os.getppid()
    while True:
        while not requests.poll(5):
            if os.getppid() != caller:  # it was killed, and other ranks hold the pipe open
                os._exit(0)
        request = requests.recv_bytes()
        sender.send_bytes(pickle.dumps(_outcome(run, request)))
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)


def _missing(results: dict[int, tuple[bool, Any]], processes: list[Any], timeout: float) -> dict[int, str]:
    """Why ranks have no result, by rank; asked for before they are killed."""
    reasons = {}
    for rank, process in enumerate(processes):
        if rank not in results:
            process.join(0.1)
            died = f"the process died with exit code {process.exitcode}"
            late = f"no result within {timeout} s, or within {GRACE} s of another rank's failure"
            reasons[rank] = late if process.exitcode is None else died
    return reasons


def _values(results: dict[int, tuple[bool, Any]], missing: dict[int, str]) -> list[Any]:
    failures = {rank: value for rank, (ok, value) in results.items() if not ok}
    failures |= {rank: ("Timeout", "", reason) for rank, reason in missing.items()}
    if failures:
        raise RankError(failures)
    return [results[rank][1] for rank in sorted(results)]


def _collect(ends: dict[Connection, int], timeout: float) -> dict[int, tuple[bool, Any]]:
    deadline = time.monotonic() + timeout
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
                deadline = min(deadline, time.monotonic() + GRACE)
    return results


def _rank_main(
    rank: int, world_size: int, store: Path | None, sender: Connection, function: Any, args: Any, env: dict[str, str]
) -> None:
    def run() -> Any:
        if store is not None:
            _join(rank, world_size, store)
        return function(*args)

    _prepare(env)
    result = _outcome(run)
    sender.send_bytes(pickle.dumps(result))  # plain pickle: torch's own would share memory with a process that ends
    sender.close()
    os._exit(0)  # skips the parent's exit handlers


def _prepare(env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    gc.freeze()  # or each collection would visit, and so copy, what the rank shares with the process that forked it
    use_no_accelerator()


def _join(rank: int, world_size: int, store: Path) -> None:
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
    except RuntimeError as error:
        raise NotJoinedError(error) from error


def _outcome(function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException as error:
        return False, (type(error).__name__, str(error), traceback.format_exc())
