"""Nodes that stand by with everything imported: on each a server that forks ranks, and torchrun."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from benchmarks.emulated_cluster import EmulatedCluster
from benchmarks.emulated_cluster.network import INTERFACE
from lightning_mics.in_memory import warm

_CLONE_NEWNET, _CLONE_NEWNS, _CLONE_NEWUTS = 0x40000000, 0x00020000, 0x04000000
PRELOADED = (*warm.IMPORTED, "torch.distributed.run", "torchdata.stateful_dataloader", "lightning")


def preload() -> None:
    """Import in this process what nodes need, since they are forked from it."""
    for module in PRELOADED:
        import_module(module)


class Nodes:
    """The nodes of an emulated cluster, and one more outside of it, which holds the launchers' store.

    Args:
        cluster: Cluster of all nodes, those that stand by included; the last one holds the store.
        logs: Folder of the nodes' logs.
        environment: Variables of all nodes.
    """

    def __init__(self, cluster: EmulatedCluster, *, logs: Path, environment: Mapping[str, str]) -> None:
        self._network = cluster.network
        self._logs = logs
        self._temporary = logs / "tmp"
        self._temporary.mkdir()
        self._environment = {**os.environ, **environment, "TMPDIR": str(self._temporary)}
        self._servers: dict[int, int] = {}  # process by node
        self.launchers: dict[int, int] = {}  # process by node

    @property
    def head(self) -> int:
        """The node that holds the store, and never dies."""
        return self._network.nodes - 1

    def start_store(self) -> None:
        """Start the store of the launchers."""
        self._fork(self.head, _serve_store)

    def stand_by(self, node: int) -> None:
        """Have a node ready, with everything imported."""
        self._servers[node] = self._fork(node, lambda: warm.serve(warm.address()))

    def launch(self, node: int, arguments: Sequence[str], *, imports: bool = False, last_call_seconds: int = 1) -> None:
        """Start torchrun on a node.

        Args:
            node: Number of the node.
            arguments: Arguments of torchrun after those of the rendezvous.
            imports: Whether in an interpreter of its own, which imports everything, as ranks then do.
            last_call_seconds: Time for further nodes to join once there are as many as launchers need.
        """
        rendezvous = [
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self._network.address(self.head)}:{STORE_PORT}"),
            "--rdzv-conf",
            f"is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout={last_call_seconds}",
            *("--local-addr", self._network.address(node)),
        ]

        def run() -> None:
            if imports:
                os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *rendezvous, *arguments])
            sys.argv = ["torchrun", *rendezvous, *arguments]
            runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)

        self.launchers[node] = self._fork(node, run)

    def kill(self, node: int) -> None:
        """Kill all processes of a node."""
        self._network.kill_node(node)
        process = self.launchers.pop(node, None)
        if process is not None:
            os.waitpid(process, 0)

    def keepers(self, node: int) -> list[int]:
        """Processes of keepers on a node."""
        commands = {process: _command(process) for process in self._network.processes(node)}
        return [process for process, command in commands.items() if b"keeper" in command]

    def files_left(self) -> list[str]:
        """Files that the job has left in memory that is a file system, or for temporary files; torchrun's own apart."""
        folders = [self._temporary, *(Path(f"/proc/{server}/root/dev/shm") for server in self._servers.values())]
        left = [path for folder in folders if folder.exists() for path in folder.iterdir()]
        return [str(path) for path in left if not path.name.startswith("torchelastic_")]

    def kill_keeper(self, node: int) -> None:
        """Kill the keeper of a node only."""
        for process in self.keepers(node):
            os.kill(process, signal.SIGKILL)

    def ended(self) -> dict[int, int]:
        """Exit statuses of the launchers that have ended, by node."""
        found = {}
        for node, process in list(self.launchers.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                found[node] = os.waitstatus_to_exitcode(status)
                del self.launchers[node]
        return found

    def _fork(self, node: int, run: object) -> int:
        """Fork a process of a node that calls ``run``."""
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            self._enter(node)
            run()  # type: ignore[operator]
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _enter(self, node: int) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        namespace, libc = self._network.namespace(node), ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{namespace}") as handle:
            if libc.setns(handle.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), "setns or unshare")
        socket.sethostname(f"node{node}")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)  # the node's own
        subprocess.run(["mount", "--bind", f"/etc/netns/{namespace}/hosts", "/etc/hosts"], check=True)
        with open(self._logs / f"node{node}.log", "ab") as log:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.clear()
        os.environ.update(self._environment)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


STORE_PORT = 29400


def _command(process: int) -> list[bytes]:
    with suppress(OSError):  # it has ended meanwhile
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return []


def _serve_store() -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore

    store = TCPStore("0.0.0.0", STORE_PORT, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1))
    signal.pause()
    del store
