"""The emulated cluster from a terminal; see ``--help``.

python -m benchmarks.emulated_cluster run --nodes 2 --rate 200mbit -- torchrun ... train.py

The other verbs act on a running cluster from any terminal.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.emulated_cluster import registry
from benchmarks.emulated_cluster.cluster import EmulatedCluster
from benchmarks.emulated_cluster.commands import Run, log_of
from benchmarks.emulated_cluster.network import Network

_DESCRIPTION = "Joins network namespaces of this machine to a cluster and runs a command on each node."
_RATE_HELP = "of each link in both directions, such as 200mbit, or 'unshaped'"


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.verb(options) or 0)
    except (RuntimeError, ValueError) as error:
        print(f"emulated_cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(options: argparse.Namespace) -> int:
    """Make a cluster, run the command on every node, and say how it ended and what the links carried."""
    signal.signal(signal.SIGTERM, _end)
    with EmulatedCluster(options.nodes, rate=_rate(options.rate), name=options.name) as cluster:
        started = cluster.start(options.command, logs=options.logs)
        print(f"cluster {cluster.network.name}: {options.nodes} nodes at {options.rate}; logs in {started.logs}")
        output = _Output(started, nodes=options.nodes)
        outcomes = started.wait(
            timeout=options.timeout, grace=options.grace, keep_going=options.keep_going, on_poll=output.print_new
        )
        output.print_new()
        print(*outcomes, sep="\n")
        _print_counters(cluster.network)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


_VERBS_OF_ONE_NODE = (
    ("cut", lambda options: _network(options).cut(options.node), "cut the link of a node"),
    ("heal", lambda options: _network(options).heal(options.node), "heal the link of a node"),
    ("kill-node", lambda options: _network(options).kill_node(options.node), "kill all processes of a node"),
)


def status(options: argparse.Namespace) -> None:
    """Print every running cluster: its links and how many processes each node has."""
    for entry in registry.clusters():
        print(f"cluster {entry.name}: {entry.nodes} nodes, made by process {entry.owner}")
        for node, link in enumerate(entry.network.link_states()):
            rate = "unshaped" if link.rate_bits is None else f"{link.rate_bits / 1e6:g}mbit"
            processes = len(entry.network.processes(node))
            print(f"  node {node}: link {'up' if link.connected else 'cut'}, {rate}, {processes} processes")


def clean(options: argparse.Namespace) -> None:
    """Remove what clusters whose owners died have left."""
    removed = registry.remove_dead()
    print(f"removed {', '.join(removed)}" if removed else "nothing to remove")


class _Output:
    """What the nodes have printed since last time, with the node in front of each line."""

    def __init__(self, run: Run, *, nodes: int) -> None:
        self._files = {node: open(log_of(run.logs, node), errors="replace") for node in range(nodes)}  # noqa: SIM115
        self._begun = dict.fromkeys(self._files, "")  # lines without an end

    def print_new(self) -> None:
        for node, file in self._files.items():
            *lines, self._begun[node] = (self._begun[node] + file.read()).split("\n")
            for line in lines:
                print(f"[node {node}] {line}", flush=True)


def _print_counters(network: Network) -> None:
    for node, link in enumerate(network.counters()):
        print(f"node {node}: sent {link.sent_bytes} bytes, received {link.received_bytes}")


def _rate(rate: str) -> str | None:
    return None if rate == "unshaped" else rate


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # through the cluster's __exit__


def _network(options: argparse.Namespace) -> Network:
    return registry.find(options.name).network


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emulated_cluster", description=_DESCRIPTION)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_run(_add_verb(verbs, "run", run, "make a cluster and run a command on each node"))
    for name, verb, meaning in _VERBS_OF_ONE_NODE:
        _add_verb(verbs, name, verb, meaning).add_argument("node", type=int)
    rate = _add_verb(verbs, "rate", lambda o: _network(o).set_rate(_rate(o.rate), node=o.node), "change links' rate")
    rate.add_argument("rate", help=_RATE_HELP)
    rate.add_argument("--node", type=int, help="the node whose link to change; all if left out")
    _add_verb(verbs, "counters", lambda o: _print_counters(_network(o)), "print what each link has carried")
    _add_verb(verbs, "status", status, "print every running cluster")
    _add_verb(verbs, "clean", clean, "remove what clusters whose owners died have left")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--rate", default="unshaped", help=_RATE_HELP)
    parser.add_argument("--logs", type=Path, help="folder for the nodes' output; a temporary one if left out")
    parser.add_argument("--timeout", type=float, help="seconds after which the command is killed everywhere")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds the others go on after one node failed")
    parser.add_argument("--keep-going", action="store_true", help="leave the others alone when one node fails")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what each node runs; write -- before it")


def _add_verb(
    verbs: Any, name: str, verb: Callable[[argparse.Namespace], int | None], meaning: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=meaning, description=meaning)
    parser.add_argument(
        "--name", help="the cluster's name; for verbs on a running cluster, needed if there are several"
    )
    parser.set_defaults(verb=verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
