"""Ranks that start in no time: a process per node has imported everything, and forks each rank that a launcher starts.

::

    torchrun --max-restarts=9 ... -m lightning_mics warm train.py --lr 1e-4

The launcher starts a small process for each rank, which asks the server of its node to fork one that runs the script,
with the same arguments, environment and streams, and ends as that one ends. The first start of a job finds no server,
starts it, and runs the script by itself. A node that stands by can have its server beforehand::

    python -m lightning_mics warm

Forked ranks are as new ones: torch has not used a device, and random number generators are seeded anew.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from lightning_mics.in_memory.keeper.wire import receive, receive_header, send_header
from lightning_mics.in_memory.launcher import PROCESS

IMPORTED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "lightning.pytorch",
    "lightning_mics.integrations.trainer.strategy",
)
IDLE_SECONDS = 1800.0  # without a rank, after which a server ends
_POLL_SECONDS = 0.02
_STREAMS = 3


def address(name: str = "") -> str:
    """Socket of this node's server in Linux' abstract namespace: one per user, interpreter and name."""
    interpreter = sys.executable.replace("/", "-")
    return f"\0lightning-mics-warm-{os.getuid()}{interpreter}-{name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or run a script as a rank.

    Args:
        arguments: A script and its arguments, or ``-m`` and a module with its own; nothing serves. None takes them from
            ``sys.argv``.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not given:
        serve(address())
        return 0
    connection = _connected(address())
    if connection is None:
        start_server()
        _run(given)
        return 0
    return _as_started(connection, given)


def start_server() -> None:
    """Start a server that survives this process; where there is one already, the new one ends."""
    subprocess.Popen(
        [sys.executable, "-m", "lightning_mics", "warm"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # launchers end the process groups of ranks
    )


def _run(arguments: list[str]) -> None:
    """Run a script in this process as Python does."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


# -- the process that a launcher has started ---------------------------------------------------------------------------


def _connected(server: str) -> socket.socket | None:
    """A connection to the server; None if there is none, or it still imports."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(server)
    except OSError:
        connection.close()
        return None
    return connection


def _as_started(connection: socket.socket, arguments: list[str]) -> int:
    """Have a rank forked, pass signals on to it, and end as it ends."""
    environment = {**os.environ, PROCESS: str(os.getppid())}
    request = {"arguments": arguments, "environment": environment, "folder": os.getcwd(), "path": sys.path}
    send_header(connection, request)
    socket.send_fds(connection, [b"\0"], range(_STREAMS))
    started, _ = receive_header(connection)
    process = int(started["process"])

    def pass_on(number: int, _: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        ended, _ = receive_header(connection)
    except ConnectionError:
        print("lightning_mics warm: the server has ended, and this rank with it", file=sys.stderr)
        return 1
    status = int(ended["status"])
    if status < 0:  # by a signal
        with suppress(OSError):  # nobody handles SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


# -- the server --------------------------------------------------------------------------------------------------------


def serve(name: str) -> None:
    """Import everything, then fork ranks until none has come for :data:`IDLE_SECONDS`.

    Args:
        name: Address to listen at; if another server does, this one ends.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(name)
    except OSError:
        return
    for module in IMPORTED:
        import_module(module)
    gc.freeze()  # or each collection of a rank would visit, and so copy, all that it shares with this process
    listening.listen(512)  # after the imports: until then ranks start by themselves
    ranks: dict[int, socket.socket] = {}
    last = time.monotonic()
    while ranks or time.monotonic() - last < IDLE_SECONDS:
        if select.select([listening], [], [], _POLL_SECONDS if ranks else 1.0)[0]:
            _fork(listening, ranks)
        while ranks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            process, status = ended
            with suppress(OSError):
                send_header(ranks[process], {"status": os.waitstatus_to_exitcode(status)})
            ranks.pop(process).close()
            last = time.monotonic()


def _fork(listening: socket.socket, ranks: dict[int, socket.socket]) -> None:
    connection, _ = listening.accept()
    try:
        user = int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        if user != os.getuid():
            raise ConnectionError("another user")
        request, _ = receive_header(connection)
        _, streams, _, _ = socket.recv_fds(connection, 1, _STREAMS)
    except OSError:
        connection.close()
        return
    process = os.fork()
    if process:
        for stream in streams:
            os.close(stream)
        ranks[process] = connection
        with suppress(OSError):
            send_header(connection, {"process": process})
        return
    listening.close()
    for other in ranks.values():
        other.close()
    _become(connection, request, streams)


def _become(connection: socket.socket, request: dict[str, Any], streams: list[int]) -> None:
    """In the forked process: run the script, and never return."""
    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[:] = request["path"]
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # Python's own generator does it by itself
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        _run(list(request["arguments"]))
        status = 0
    except SystemExit as error:
        status = _status_of(error)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _exit(status)


def _status_of(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _exit(status: int) -> None:
    """End as the interpreter would."""
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)


def _end_with(connection: socket.socket) -> None:
    """End this rank when the process that a launcher has started ends, which the launcher may kill."""
    with suppress(OSError):
        receive(connection, 1)  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGKILL)
