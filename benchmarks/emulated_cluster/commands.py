"""One command per node: starting it with a launcher's environment, watching it, and saying how it ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.emulated_cluster.network import INTERFACE, Network, kill_processes

_POLL_SECONDS = 0.05
_TAIL_LINES = 30

# A host name of its own per node: launchers tell nodes apart by it. The shell makes it and becomes the command.
_NAMED = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
_FREE_PORT = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"


@dataclass(frozen=True, kw_only=True)
class NodeOutcome:
    """How the command of one node ended."""

    node: int
    exit_status: int  # of a command that a signal ended: minus the signal's number
    stopped: str | None  # why it was stopped, if it did not end by itself
    log: Path

    @property
    def ok(self) -> bool:
        """Whether the command ended by itself, with status 0."""
        return self.exit_status == 0 and self.stopped is None

    @property
    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])

    def __str__(self) -> str:
        if self.stopped:
            return f"node {self.node} was stopped: {self.stopped}"
        if self.exit_status < 0:
            return f"node {self.node} was killed by {signal.Signals(-self.exit_status).name}"
        return f"node {self.node} ended with status {self.exit_status}"


class Run:
    """A command that was started on nodes, one process each; made by ``EmulatedCluster.start``."""

    def __init__(self, network: Network, processes: dict[int, subprocess.Popen[bytes]], *, logs: Path) -> None:
        self.logs = logs
        self._network = network
        self._processes = processes
        self._stopped: dict[int, str] = {}

    def wait(
        self,
        *,
        timeout: float | None = None,
        grace: float = 5.0,
        keep_going: bool = False,
        on_poll: Callable[[], None] | None = None,
    ) -> list[NodeOutcome]:
        """Wait until the command has ended on every node.

        Args:
            timeout: Seconds after which what still runs is killed.
            grace: Seconds that the others may go on after the command failed on one node; then they are killed.
            keep_going: Leave the others alone when the command fails on one node.
            on_poll: Called again and again while waiting.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        reason = f"the time limit of {timeout} s was over"
        failed: int | None = None
        while self.running():
            if failed is None and not keep_going and (failures := self._failures()):
                failed = failures[0]
                if time.monotonic() + grace < end:
                    end, reason = time.monotonic() + grace, f"node {failed} had failed {grace} s before"
            if time.monotonic() >= end:
                self.stop(reason)
            if on_poll is not None:
                on_poll()
            time.sleep(_POLL_SECONDS)
        return self.outcomes()

    def running(self) -> list[int]:
        """The nodes on which the command has not ended."""
        return [node for node, process in self._processes.items() if process.poll() is None]

    def stop(self, reason: str) -> None:
        """Kill what still runs, with all it started; ``reason`` goes into the outcomes."""
        for node in self.running():
            self._stopped[node] = reason
            kill_processes(self._network.namespace(node))
            self._processes[node].wait()

    def outcomes(self) -> list[NodeOutcome]:
        """How the command ended, by node; of the nodes on which it has."""
        return [
            NodeOutcome(node=node, exit_status=status, stopped=self._stopped.get(node), log=log_of(self.logs, node))
            for node, process in self._processes.items()
            if (status := process.poll()) is not None
        ]

    def _failures(self) -> list[int]:
        return [node for node, process in self._processes.items() if process.poll() not in (None, 0)]


def start_commands(
    network: Network, command: Sequence[str], *, nodes: Sequence[int], env: Mapping[str, str], logs: Path
) -> Run:
    """Start ``command`` on each of ``nodes``, its output going to a log per node."""
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port(network)
    processes = {}
    for node in nodes:
        inside = ["ip", "netns", "exec", network.namespace(node), "unshare", "--uts"]
        with open(log_of(logs, node), "ab") as log:
            processes[node] = subprocess.Popen(
                [*inside, "sh", "-c", _NAMED, f"node{node}", *command],
                env={**os.environ, **_environment(network, node, port), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the owner of the cluster, which then stops the nodes
            )
    return Run(network, processes, logs=logs)


def log_of(logs: Path, node: int) -> Path:
    """Where the output of ``node`` goes."""
    return logs / f"node{node}.log"


def _environment(network: Network, node: int, port: int) -> dict[str, str]:
    return {
        "NNODES": str(network.nodes),
        "NODE_RANK": str(node),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "TP_SOCKET_IFNAME": INTERFACE,
        "NCCL_HOSTID": f"{network.name}-node{node}",  # else NCCL finds one machine and passes the link by
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # so that the log of a killed node has its last words
    }


def _free_port(network: Network) -> int:
    """A port that is free on node 0; the namespaces keep it free of everything else on the machine."""
    inside = ["ip", "netns", "exec", network.namespace(0), sys.executable, "-S", "-c", _FREE_PORT]
    done = subprocess.run(inside, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(inside)} ended with status {done.returncode}: {done.stderr.strip()}")
    return int(done.stdout)
