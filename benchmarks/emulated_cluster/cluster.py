"""An emulated cluster as an object: made on entering, gone on leaving, however that happens."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.emulated_cluster import registry
from benchmarks.emulated_cluster.commands import Run, start_commands
from benchmarks.emulated_cluster.iproute import check_machine
from benchmarks.emulated_cluster.network import MOST_NODES, Network
from benchmarks.emulated_cluster.rates import bits_per_second
from benchmarks.emulated_cluster.reaper import reaper


class EmulatedCluster:
    """Nodes on one machine, each behind a link of its own::

        with EmulatedCluster(2, rate="200mbit") as cluster:
            outcomes = cluster.start(["python", "train.py"]).wait(timeout=600)
            sent = [link.sent_bytes for link in cluster.network.counters()]

    ``cluster.network`` changes rates, cuts and heals links, kills nodes and reads counters, at any time.

    Args:
        nodes: How many nodes to join.
        rate: Each link's rate in both directions at once, such as ``"200mbit"``; ``None`` leaves links unshaped.
        name: To find the cluster by from another terminal; ``None`` makes one up.

    Raises:
        RuntimeError: On entering, if this machine cannot do it; nothing has been made then.
        TypeError: If ``nodes`` is not an integer.
        ValueError: If an argument is out of range, or a cluster of that name is running.
    """

    def __init__(self, nodes: int, *, rate: str | None = None, name: str | None = None) -> None:
        if isinstance(nodes, bool) or not isinstance(nodes, int):
            raise TypeError(f"nodes must be an integer, got {nodes!r} ({type(nodes).__name__})")
        if not 1 <= nodes <= MOST_NODES:
            raise ValueError(f"nodes={nodes} must be 1 to {MOST_NODES}")
        if rate is not None:
            bits_per_second(rate)  # refuses what is not a rate
        self.network = Network(name=name or secrets.token_hex(4), nodes=nodes)
        self._rate = rate

    def __enter__(self) -> EmulatedCluster:
        check_machine()
        registry.enter(self.network)
        with ExitStack() as undo:
            undo.callback(registry.remove, self.network.name)
            undo.enter_context(reaper(self.network.name))
            self.network.create()
            self.network.set_rate(self._rate)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def start(
        self,
        command: Sequence[str],
        *,
        nodes: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
    ) -> Run:
        """Start ``command`` on all nodes, or on some, and return at once.

        The environment has torchrun's names for a node (``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``)
        and keeps gloo and NCCL on the node's link.

        Args:
            command: The program and its arguments.
            nodes: Where to start it; ``None`` for everywhere. A node that was killed can be started again.
            env: More environment variables; they come before those of the cluster.
            logs: The folder for ``node0.log`` and so on; ``None`` makes one in the folder for temporary files.
        """
        if not command:
            raise ValueError("command is empty; give the program and its arguments")
        run = start_commands(
            self.network,
            command,
            nodes=range(self.network.nodes) if nodes is None else nodes,
            env=env or {},
            logs=logs or Path(tempfile.mkdtemp(prefix=f"emulated-cluster-{self.network.name}-")),
        )
        self._undo.callback(run.stop, "the cluster ended")
        return run
