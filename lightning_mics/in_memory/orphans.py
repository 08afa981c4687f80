"""Workers that a rank has forked end with it.

A worker of a data loader inherits the connections of its rank to the others. When the rank is killed they stay open,
and nobody notices, until the worker looks for its parent, which it does every five seconds (torch 2.13). So Linux is
asked to end it at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from functools import lru_cache

_PR_SET_PDEATHSIG = 1


@lru_cache(maxsize=1)
def end_workers_with_this_rank() -> None:
    """Let the processes that the main thread forks from now on be killed when this process dies; on Linux only.

    Linux means the thread that has forked, so workers of other threads are left alone: a thread may end before them. So
    are programs that are started, as keepers are.
    """
    own = os.getpid()
    of_main_thread = False

    def note_thread() -> None:
        nonlocal of_main_thread
        of_main_thread = os.getpid() == own and threading.current_thread() is threading.main_thread()

    def follow_rank() -> None:
        if of_main_thread:
            end_with(own)

    os.register_at_fork(before=note_thread, after_in_child=follow_rank)


def end_with(parent: int) -> None:
    """Let this process, which was forked just now, be killed when the thread dies that has forked it; on Linux only.

    Args:
        parent: Process that has forked this one.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError):  # another system
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)
