"""Several jobs in one process, one after another, for a sweep on one machine (``python train.py -m ...``)."""

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
    """Restore the state of the process after a job, even if it fails, so that the next job can start.

    Args:
        overrides: Overrides of this job alone. Lightning starts other ranks with the command line of this process, and
            with the command line of a sweep each rank would run the sweep itself.
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
    """Kill ranks before they fail as well: Lightning would then kill this process, and with it the remaining jobs."""
    for watcher in _watchers():
        ranks = list(watcher._child_processes)
        watcher._child_processes.clear()  # a watcher without processes ends
        for rank in ranks:
            rank.kill()
            rank.wait()


def _watchers() -> list[_ChildProcessObserver]:
    """The threads in which Lightning watches the ranks that it has started; it has no hook for them (2.6)."""
    return [thread for thread in threading.enumerate() if isinstance(thread, _ChildProcessObserver)]
