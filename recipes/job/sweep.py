"""Several jobs in one process, as a sweep on one machine runs them (``python train.py -m ...``)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver


@contextmanager
def one_job(overrides: Sequence[str]) -> Iterator[None]:
    """Leave the process as the job has found it, so that the next one can be started in it, also if the job fails.

    Args:
        overrides: Those of this job alone. Lightning starts the other ranks by the command line, and that of a sweep
            would have each of them run the whole sweep.
    """
    arguments, environment = sys.argv[1:], dict(os.environ)
    sys.argv[1:] = overrides
    try:
        yield
        _wait_for_other_ranks()
    except Exception:
        _kill_other_ranks()
        raise
    finally:
        sys.argv[1:] = arguments
        os.environ.clear()
        os.environ.update(environment)
        if dist.is_initialized():
            dist.destroy_process_group()


def _wait_for_other_ranks() -> None:
    for watcher in _watchers():
        for rank in watcher._child_processes:
            rank.wait()


def _kill_other_ranks() -> None:
    """Before they fail as well: Lightning kills this process, and with it the jobs to come, when one of them does."""
    for watcher in _watchers():
        ranks = list(watcher._child_processes)
        watcher._child_processes.clear()  # without any to watch, it ends
        for rank in ranks:
            rank.kill()
            rank.wait()


def _watchers() -> list[_ChildProcessObserver]:
    """The threads in which Lightning looks after ranks that it has started; it has no hook for them (2.6)."""
    return [thread for thread in threading.enumerate() if isinstance(thread, _ChildProcessObserver)]
