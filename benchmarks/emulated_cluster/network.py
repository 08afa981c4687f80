"""The network of an emulated cluster: a namespace per node, and one more with the bridge that joins them.

::

    namespace ec-NAME-0      namespace ec-NAME-switch      namespace ec-NAME-1
    eth0 10.0.0.1  =======  node0 -- bridge -- node1  =======  eth0 10.0.0.2
     shaped: sends        shaped: what node 0 receives

Nothing of it is in the machine's own namespace, so no route or address of the machine can clash with it. Everything is
found by its name, so any process of root can cut a link or kill a node of a cluster that another process started.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.emulated_cluster.iproute import ip, ip_batch, ip_json, tc, tc_json
from benchmarks.emulated_cluster.rates import token_bucket

INTERFACE = "eth0"  # the same inside every node
MOST_NODES = 254  # addresses 10.0.0.1 to 10.0.0.254

_MTU_BYTES = 9000  # as in the networks of clusters; headers are then under 1 % of what the shaping counts

_NAMESPACES = Path("/run/netns")
_FILES = Path("/etc/netns")  # `ip netns exec` shows a node the files in its folder here instead of those in /etc
_SECONDS_TO_DIE = 20.0


@dataclass(frozen=True, kw_only=True)
class LinkCounters:
    """What one node's link has carried since the cluster exists; packet headers included."""

    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """How one node's link is now: whether it carries anything, and its rate in bit/s (``None``: unshaped)."""

    connected: bool
    rate_bits: int | None


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network of the cluster ``name``, whether it exists yet or not."""

    name: str
    nodes: int

    def namespace(self, node: int) -> str:
        """The network namespace of ``node``."""
        if not 0 <= node < self.nodes:
            raise ValueError(f"node={node} is not one of the {self.nodes} nodes 0 to {self.nodes - 1}")
        return f"ec-{self.name}-{node}"

    @property
    def switch(self) -> str:
        """The network namespace of the bridge."""
        return f"ec-{self.name}-switch"

    def address(self, node: int) -> str:
        """The address of ``node``; its name, ``node0`` and so on, resolves to it inside the cluster."""
        return f"10.0.0.{node + 1}"

    def create(self) -> None:
        """Make all namespaces and links, unshaped."""
        ip_batch([f"netns add {namespace}" for namespace in self._namespaces()])
        ip_batch(
            ["link add bridge type bridge mcast_snooping 0", f"link set bridge mtu {_MTU_BYTES} addrgenmode none up"],
            namespace=self.switch,
        )
        for node in range(self.nodes):
            self._connect(node)
            self._name_the_nodes(node)

    def remove(self) -> None:
        """Kill every process and remove everything; what is already gone is no error."""
        for namespace in self._namespaces():
            kill_processes(namespace)
            with suppress(RuntimeError):  # another process may have removed it since
                ip(f"netns del {namespace}")
            if (_NAMESPACES / namespace).exists():
                raise RuntimeError(f"could not remove the network namespace {namespace}")
            shutil.rmtree(_FILES / namespace, ignore_errors=True)
        with suppress(OSError):  # other clusters use it too
            _FILES.rmdir()

    def set_rate(self, rate: str | None, *, node: int | None = None) -> None:
        """Hold the link of ``node``, or every link, to ``rate`` in both directions from now on; ``None``: unshaped."""
        bucket = [] if rate is None else ["tbf", *token_bucket(rate).tc_options]
        for each in range(self.nodes) if node is None else [node]:
            for namespace, interface in ((self.namespace(each), INTERFACE), (self.switch, f"node{each}")):
                if bucket:
                    tc(["qdisc", "replace", "dev", interface, "root", *bucket], namespace=namespace)
                elif _rates(namespace)[interface] is not None:
                    tc(["qdisc", "del", "dev", interface, "root"], namespace=namespace)

    def kill_node(self, node: int) -> None:
        """Kill all processes of ``node``, as if its power failed; the link stays."""
        kill_processes(self.namespace(node))

    def cut(self, node: int) -> None:
        """Pull the cable of ``node``: nothing passes in either direction, and no connection is told."""
        self.namespace(node)  # refuses a node that does not exist
        ip(f"link set node{node} down", namespace=self.switch)

    def heal(self, node: int) -> None:
        """Plug the cable of ``node`` in again."""
        self.namespace(node)
        ip(f"link set node{node} up", namespace=self.switch)

    def counters(self) -> list[LinkCounters]:
        """The byte counters of every node's link, read at the bridge."""
        found = {link["ifname"]: link["stats64"] for link in ip_json("-statistics link show", namespace=self.switch)}
        ports = [found[f"node{node}"] for node in range(self.nodes)]
        return [LinkCounters(sent_bytes=port["rx"]["bytes"], received_bytes=port["tx"]["bytes"]) for port in ports]

    def link_states(self) -> list[LinkState]:
        """How every node's link is now."""
        rates = _rates(self.switch)
        flags = {link["ifname"]: link["flags"] for link in ip_json("link show", namespace=self.switch)}
        ports = [f"node{node}" for node in range(self.nodes)]
        return [LinkState(connected="UP" in flags[port], rate_bits=rates[port]) for port in ports]

    def processes(self, node: int) -> list[int]:
        """The processes of ``node``, daemons that left its command included."""
        return list(_processes(self.namespace(node)))

    def _namespaces(self) -> list[str]:
        return [*(self.namespace(node) for node in range(self.nodes)), self.switch]

    def _connect(self, node: int) -> None:
        port = f"node{node}"
        peer = f"name {INTERFACE} mtu {_MTU_BYTES} netns {self.namespace(node)}"
        # IPv6 would add its own announcements to the counters.
        commands = [
            f"link add {port} mtu {_MTU_BYTES} type veth peer {peer}",
            f"link set {port} master bridge addrgenmode none up",
        ]
        ip_batch(commands, namespace=self.switch)
        commands = [
            "link set lo up",
            f"link set {INTERFACE} addrgenmode none up",
            f"address add {self.address(node)}/24 dev {INTERFACE}",
        ]
        ip_batch(commands, namespace=self.namespace(node))

    def _name_the_nodes(self, node: int) -> None:
        folder = _FILES / self.namespace(node)
        folder.mkdir(parents=True, exist_ok=True)
        # The second form is what a socket for IPv6 and IPv4 calls the address; torch looks it up and warns without it.
        forms = ("{}", "::ffff:{}")
        names = [f"{form.format(self.address(other))} node{other}" for form in forms for other in range(self.nodes)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))


def kill_processes(namespace: str) -> None:
    """Kill whatever runs in a network namespace, forks that escape the first round included."""
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while running := list(_processes(namespace)):
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {running} of namespace {namespace} outlive SIGKILL; the kernel holds them")
        time.sleep(0.005)


def _processes(namespace: str) -> Iterator[int]:
    try:
        wanted = os.stat(_NAMESPACES / namespace)
    except FileNotFoundError:
        return
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # a process that has ended meanwhile
                if os.path.samestat(os.stat(folder / "ns/net"), wanted):
                    yield int(folder.name)


def _rates(namespace: str) -> dict[str, int | None]:
    disciplines = tc_json("qdisc show", namespace=namespace)
    return {each["dev"]: each["options"]["rate"] * 8 if each["kind"] == "tbf" else None for each in disciplines}
