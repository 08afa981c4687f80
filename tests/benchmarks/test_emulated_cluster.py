"""Links of an emulated cluster carry, count and shape real TCP; nodes fail, one by one, and are reported one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emulated_cluster import EmulatedCluster, NodeOutcome
from tests.benchmarks.clusters import TRAFFIC, needs_cluster, until

pytestmark = needs_cluster
MEGABYTE = 10**6


def reports(cluster: EmulatedCluster, *traffic: str, logs: Path) -> list[Any]:
    outcomes = cluster.start([*TRAFFIC, *traffic], logs=logs).wait(timeout=60)
    assert all(outcome.ok for outcome in outcomes), [f"{outcome}: {outcome.tail}" for outcome in outcomes]
    return [json.loads(outcome.log.read_text()) for outcome in outcomes]


def shell(cluster: EmulatedCluster, script: str, *, logs: Path, **waiting: Any) -> list[NodeOutcome]:
    return cluster.start(["sh", "-c", script], logs=logs).wait(**{"timeout": 60, **waiting})


def test_counters_are_the_bytes_a_socket_sent_and_a_little_more_for_headers(tmp_path: Path) -> None:
    size = 8 * MEGABYTE
    with EmulatedCluster(3) as cluster:
        inside = reports(cluster, "gather", str(size), logs=tmp_path)
        receiver, *senders = cluster.network.counters()
    assert inside[0]["received"] == 2 * size
    for sender in senders:
        assert size < sender.sent_bytes < 1.05 * size
    assert 2 * size < receiver.received_bytes < 1.05 * 2 * size
    assert receiver.sent_bytes < 0.05 * size  # acknowledgements
    for node, (link, report) in enumerate(zip([receiver, *senders], inside, strict=True)):
        assert report["sent_bytes"] == pytest.approx(link.sent_bytes, abs=2000), node  # the connections' ends
        assert report["received_bytes"] == pytest.approx(link.received_bytes, abs=2000), node


def test_links_hold_their_rate_in_both_directions_at_once_and_it_can_be_changed(tmp_path: Path) -> None:
    with EmulatedCluster(2, rate="80mbit") as cluster:
        slow = reports(cluster, "exchange", str(4 * MEGABYTE), logs=tmp_path / "slow")
        cluster.network.set_rate("320mbit")
        fast = reports(cluster, "exchange", str(16 * MEGABYTE), logs=tmp_path / "fast")
        cluster.network.set_rate(None)
        free = reports(cluster, "exchange", str(16 * MEGABYTE), logs=tmp_path / "free")
    assert all(45 < report["mbit"] < 90 for report in slow), slow  # loose: other tests may keep the machine busy
    assert all(200 < report["mbit"] < 350 for report in fast), fast
    assert max(report["mbit"] for report in free) > 350, free


def test_what_a_node_receives_is_held_to_the_rate_whoever_sends(tmp_path: Path) -> None:
    with EmulatedCluster(4, rate="80mbit") as cluster:
        receiver, *_ = reports(cluster, "gather", str(2 * MEGABYTE), logs=tmp_path)
    assert 60 < receiver["mbit"] < 90


def test_one_link_can_have_a_rate_of_its_own() -> None:
    with EmulatedCluster(2, rate="80mbit") as cluster:
        cluster.network.set_rate("20mbit", node=1)
        cluster.network.set_rate(None, node=0)
        assert [link.rate_bits for link in cluster.network.link_states()] == [None, 20 * MEGABYTE]


def test_a_cut_link_carries_nothing_and_connections_go_on_when_it_is_healed(tmp_path: Path) -> None:
    with EmulatedCluster(2, rate="50mbit") as cluster:
        network = cluster.network
        cluster.start([*TRAFFIC, "stream"], logs=tmp_path)
        until(lambda: network.counters()[0].received_bytes > MEGABYTE)
        network.cut(1)
        before = network.counters()[0].received_bytes
        assert not cluster.start([*TRAFFIC, "reach"], nodes=[1], logs=tmp_path / "reach").wait()[0].ok
        queued = network.counters()[0].received_bytes - before  # in front of node 0 when the link was cut
        assert queued < MEGABYTE
        assert [link.connected for link in network.link_states()] == [True, False]
        network.heal(1)
        until(lambda: network.counters()[0].received_bytes > before + queued + MEGABYTE)
        assert cluster.start([*TRAFFIC, "reach"], nodes=[1], logs=tmp_path / "reach").wait()[0].ok


def test_a_killed_node_loses_all_its_processes_and_can_start_again(tmp_path: Path) -> None:
    script = "setsid sh -c 'sleep 1000 & sleep 1000' & sleep 1000"
    with EmulatedCluster(2) as cluster:
        run = cluster.start(["sh", "-c", script], logs=tmp_path)
        until(lambda: all(len(cluster.network.processes(node)) == 5 for node in (0, 1)))
        cluster.network.kill_node(1)
        assert cluster.network.processes(1) == []
        assert len(cluster.network.processes(0)) >= 4
        survivor, killed = run.wait(grace=0.1)
        assert str(killed) == "node 1 was killed by SIGKILL"
        assert str(survivor) == "node 0 was stopped: node 1 had failed 0.1 s before"
        assert cluster.start(["true"], nodes=[1], logs=tmp_path).wait()[0].ok


def test_a_failure_is_reported_with_its_status_and_log_and_the_others_are_stopped(tmp_path: Path) -> None:
    with EmulatedCluster(3) as cluster:
        script = "echo from $NODE_RANK; [ $NODE_RANK = 1 ] && exit 3; [ $NODE_RANK = 2 ] || sleep 1000"
        stopped, failed, finished = shell(cluster, script, logs=tmp_path, grace=0.2)
        assert cluster.network.processes(0) == []
    assert (failed.exit_status, failed.stopped, failed.tail) == (3, None, "from 1")
    assert (stopped.stopped, stopped.tail) == ("node 1 had failed 0.2 s before", "from 0")
    assert finished.ok and not failed.ok and not stopped.ok


def test_the_others_finish_when_told_to_keep_going(tmp_path: Path) -> None:
    with EmulatedCluster(2) as cluster:
        script = f"[ $NODE_RANK = 1 ] && exit 3; while [ ! -e {tmp_path}/go ]; do :; done"
        polls: list[int] = []

        def go_on_after_a_while() -> None:
            polls.append(1)
            if len(polls) > 8:
                (tmp_path / "go").touch()

        outcomes = shell(cluster, script, logs=tmp_path, keep_going=True, grace=0, on_poll=go_on_after_a_while)
    assert [outcome.exit_status for outcome in outcomes] == [0, 3]


def test_the_time_limit_ends_all_nodes(tmp_path: Path) -> None:
    with EmulatedCluster(2) as cluster:
        outcomes = shell(cluster, "sleep 1000", logs=tmp_path, timeout=0.2)
    assert [outcome.stopped for outcome in outcomes] == ["the time limit of 0.2 s was over"] * 2


def test_each_node_has_a_launchers_environment_a_name_and_an_address(tmp_path: Path) -> None:
    variables = "$NNODES $NODE_RANK $GROUP_RANK $MASTER_ADDR $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $OMP_NUM_THREADS"
    script = f'echo {variables} $(hostname); getent ahostsv4 node1 | head -1; echo "$MASTER_PORT"'
    with EmulatedCluster(2) as cluster:
        outcomes = shell(cluster, script, logs=tmp_path)
    first, second = (outcome.tail.splitlines() for outcome in outcomes)
    assert first[0] == "2 0 0 10.0.0.1 eth0 eth0 1 node0"
    assert second[0] == "2 1 1 10.0.0.1 eth0 eth0 1 node1"
    assert first[1].split() == second[1].split() == ["10.0.0.2", "STREAM", "node1"]
    assert first[2] == second[2] and int(first[2]) > 1023
