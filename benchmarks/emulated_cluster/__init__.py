"""Nodes of a cluster on one machine: a network namespace each, joined by links whose rate can be chosen.

Real TCP goes through the links, so what a program sends between nodes can be read from their counters, and what a slow
network does to it can be measured. ``python -m benchmarks.emulated_cluster --help`` is the same from a terminal.
"""

from benchmarks.emulated_cluster.cluster import EmulatedCluster
from benchmarks.emulated_cluster.commands import NodeOutcome, Run
from benchmarks.emulated_cluster.network import LinkCounters, LinkState, Network

__all__ = ["EmulatedCluster", "LinkCounters", "LinkState", "Network", "NodeOutcome", "Run"]
