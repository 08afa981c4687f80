"""Nothing of an emulated cluster stays, however it ends; and nobody removes the cluster of somebody else."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.emulated_cluster import EmulatedCluster, Network, registry
from benchmarks.emulated_cluster.__main__ import main
from tests.benchmarks.clusters import ROOT, alive, namespaces, needs_cluster, until

pytestmark = needs_cluster
DAEMON = "setsid sh -c 'sleep 1000 & sleep 1000' & sleep 1000"
PROCESSES = 5  # what DAEMON is: two shells and three sleeps


@contextmanager
def tool() -> Iterator[tuple[Network, subprocess.Popen[str]]]:
    """``emulated_cluster run`` on two nodes, in a process of its own, once its command runs on both."""
    network = Network(name=f"test-{secrets.token_hex(4)}", nodes=2)
    logs = tempfile.TemporaryDirectory()
    options = ["--nodes", "2", "--name", network.name, "--grace", "0.1", "--logs", logs.name]
    command = [sys.executable, "-m", "benchmarks.emulated_cluster", "run", *options, "--", "sh", "-c", DAEMON]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit it as ignored
    )
    try:
        until(lambda: all(len(network.processes(node)) == PROCESSES for node in range(2)))
        yield network, process
    finally:
        process.kill()
        process.communicate()
        until(lambda: registry.remove_dead() or not namespaces(network))
        logs.cleanup()


def gone(network: Network) -> bool:
    return not namespaces(network) and network.name not in [entry.name for entry in registry.clusters()]


def reaper_of(network: Network) -> int:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.joinpath("cmdline").exists():
            arguments = folder.joinpath("cmdline").read_bytes().decode().split("\0")
            if "benchmarks.emulated_cluster.reaper" in arguments and network.name in arguments:
                return int(folder.name)
    raise AssertionError("no reaper")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_stays_after_a_signal_that_asks_the_tool_to_end(number: signal.Signals, status: int) -> None:
    with tool() as (network, process):
        running = [pid for node in range(2) for pid in network.processes(node)]
        process.send_signal(number)
        assert process.wait(timeout=30) == status
        assert gone(network)
        assert not any(alive(pid) for pid in running)


def test_nothing_stays_after_the_tool_is_killed_outright() -> None:
    with tool() as (network, process):
        running = [pid for node in range(2) for pid in network.processes(node)]
        process.kill()
        until(lambda: gone(network))
        until(lambda: not any(alive(pid) for pid in running))


def test_the_next_start_removes_what_a_dead_cluster_left_and_nothing_of_a_live_one() -> None:
    with tool() as (dead, process), tool() as (live, _):
        os.kill(reaper_of(dead), signal.SIGKILL)
        process.kill()
        process.wait()
        assert len(namespaces(dead)) == 3 and len(dead.processes(0)) == PROCESSES
        with EmulatedCluster(1) as cluster:
            assert gone(dead)
            assert len(namespaces(cluster.network)) == 2
        assert not gone(live)
        assert len(live.processes(0)) == len(live.processes(1)) == PROCESSES


def test_clean_removes_what_a_dead_cluster_left(capsys: pytest.CaptureFixture[str]) -> None:
    with tool() as (network, process):
        os.kill(reaper_of(network), signal.SIGKILL)
        process.kill()
        process.wait()
        assert main(["clean"]) == 0
        assert gone(network)
        assert network.name in capsys.readouterr().out
        assert main(["clean"]) == 0
        assert network.name not in capsys.readouterr().out


def test_nothing_stays_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), EmulatedCluster(2) as cluster:  # noqa: PT012
        cluster.start(["sh", "-c", DAEMON], logs=tmp_path)
        until(lambda: len(cluster.network.processes(1)) == PROCESSES)
        running = cluster.network.processes(1)
        raise KeyError
    assert gone(cluster.network)
    assert not any(alive(pid) for pid in running)


def test_nothing_stays_of_a_cluster_that_could_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = EmulatedCluster(2)
    monkeypatch.setattr(Network, "set_rate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), cluster:
        pass
    assert gone(cluster.network)


def test_every_verb_works_on_a_running_cluster_from_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    with tool() as (network, process):
        named = ["--name", network.name]
        for verb in (["rate", "50mbit"], ["rate", "unshaped", "--node", "0"], ["cut", "1"]):
            assert main([*verb, *named]) == 0
        assert main(["status"]) == 0
        assert f"node 0: link up, unshaped, {PROCESSES} processes" in (printed := capsys.readouterr().out)
        assert f"node 1: link cut, 50mbit, {PROCESSES} processes" in printed
        assert main(["heal", "1", *named]) == 0
        assert all(link.connected for link in network.link_states())
        assert main(["counters", *named]) == 0
        assert "node 1: sent " in capsys.readouterr().out
        assert main(["kill-node", "1", *named]) == 0
        assert network.processes(1) == []
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "node 1 was killed by SIGKILL" in output and "node 0 was stopped: node 1 had failed" in output


def test_a_name_that_is_in_use_is_refused_and_the_other_cluster_stays() -> None:
    with EmulatedCluster(1) as cluster:
        with pytest.raises(ValueError, match=f"{cluster.network.name!r} is running .*use another name"):
            EmulatedCluster(1, name=cluster.network.name).__enter__()
        assert len(namespaces(cluster.network)) == 2
