"""Workers that a rank has forked end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, subprocess, sys, threading, time
from lightning_mics.in_memory.orphans import end_workers_with_this_rank

def fork():
    process = os.fork()
    if not process:
        time.sleep(60)
        os._exit(0)
    children.append(process)

children = []
if sys.argv[1] == "follows":
    end_workers_with_this_rank()
fork()
thread = threading.Thread(target=fork)
thread.start()
thread.join()
children.append(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid)
print(*children, flush=True)
time.sleep(60)
"""


def lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("way", "left"), [("follows", [False, True, True]), ("does not", [True, True, True])])
def test_what_the_main_thread_has_forked_dies_with_the_rank(way: str, left: list[bool]) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, way], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        children = list(map(int, rank.stdout.readline().split()))
        try:
            assert list(map(lives, children)) == [True, True, True]  # also the one whose thread has ended
            rank.kill()
            rank.wait()
            time.sleep(0.5)
            assert list(map(lives, children)) == left
        finally:
            for process in filter(lives, children):
                os.kill(process, signal.SIGKILL)
