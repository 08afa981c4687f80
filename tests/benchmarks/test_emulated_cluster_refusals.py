"""What cannot work is refused before anything is made, and the message says what to change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.emulated_cluster import EmulatedCluster, Network, iproute, registry
from benchmarks.emulated_cluster.__main__ import main
from benchmarks.emulated_cluster.rates import bits_per_second, token_bucket
from benchmarks.link_counters import sent_bytes


@pytest.fixture
def no_clusters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine where no cluster has ever run."""
    monkeypatch.setattr(registry, "_FOLDER", tmp_path / "clusters")


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Only these commands exist from now on."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_rates_are_numbers_with_a_unit() -> None:
    rates = {"200mbit": 200_000_000, "1.5gbit": 1_500_000_000, "2500kbit": 2_500_000}
    assert {rate: bits_per_second(rate) for rate in rates} == rates


def test_a_bucket_holds_the_largest_packets_and_the_queue_more() -> None:
    for rate in ("1mbit", "200mbit", "10gbit"):
        bucket = token_bucket(rate)
        assert bucket.burst_bytes > 2 * 64 * 1024
        assert bucket.queue_bytes > bucket.burst_bytes


@pytest.mark.parametrize("rate", ["200", "fast", "-1mbit", "200 Mbps", ""])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match=r"is not a rate; write a number and one of kbit, mbit, gbit"):
        EmulatedCluster(2, rate=rate)


@pytest.mark.parametrize("rate", ["1kbit", "0mbit", "101gbit"])
def test_rates_that_cannot_be_held_are_refused(rate: str) -> None:
    with pytest.raises(ValueError, match=f"rate={rate!r} is out of range; use '1mbit' to '100gbit'"):
        EmulatedCluster(2, rate=rate)


@pytest.mark.parametrize("nodes", [0, -1, 255])
def test_a_number_of_nodes_that_cannot_be_is_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=f"nodes={nodes} must be 1 to 254"):
        EmulatedCluster(nodes)


def test_nodes_must_be_an_integer() -> None:
    with pytest.raises(TypeError, match=r"nodes must be an integer, got 2\.0 \(float\)"):
        EmulatedCluster(2.0)  # type: ignore[arg-type]


def test_a_name_that_is_no_name_is_refused(no_clusters: None) -> None:
    with pytest.raises(ValueError, match=r"name='A b' must be 1 to 32 of a-z, 0-9 and '-'"):
        registry.enter(Network(name="A b", nodes=1))


def test_a_node_that_does_not_exist_is_refused() -> None:
    network = Network(name="n", nodes=2)
    for verb in (network.cut, network.heal, network.kill_node, network.processes):
        with pytest.raises(ValueError, match="node=2 is not one of the 2 nodes 0 to 1"):
            verb(2)


@pytest.mark.parametrize(("present", "missing"), [((), "ip"), (("ip",), "tc")])
def test_a_machine_without_iproute2_is_refused(
    present: tuple[str, ...], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_clusters: None
) -> None:
    programs(tmp_path, monkeypatch, **dict.fromkeys(present, "exit 0"))
    with pytest.raises(RuntimeError, match=f"needs the command '{missing}', .*apt-get install iproute2"):
        EmulatedCluster(2).__enter__()
    assert not (tmp_path / "clusters").exists()


def test_a_user_who_is_not_root_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_clusters: None) -> None:
    programs(tmp_path, monkeypatch, ip="exit 0", tc="exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match=r"needs root .* this is user 1000: use sudo"):
        EmulatedCluster(2).__enter__()
    assert not (tmp_path / "clusters").exists()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            "true",
            r"gives this process no network namespaces \(no way\); run on the machine itself or in a priv",
        ),
        ("bridge", r"has no bridges \(no way\); try: modprobe bridge"),
        ("veth", r"has no veth pairs \(no way\); try: modprobe veth"),
        ("tbf", r"has no tbf shaping \(no way\); try: modprobe sch_tbf"),
    ],
)
def test_a_kernel_that_lacks_something_is_refused(
    refused: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_clusters: None
) -> None:
    trial = f'case "$*" in *{refused}*) echo no way >&2; exit 1;; esac'
    programs(tmp_path, monkeypatch, ip="exit 0", tc="exit 0", unshare=trial)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(RuntimeError, match=message):
        EmulatedCluster(2).__enter__()
    assert not (tmp_path / "clusters").exists()


def test_a_refusal_of_ip_shows_the_command_and_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(tmp_path, monkeypatch, ip="echo no way >&2; exit 2")
    with pytest.raises(RuntimeError, match="'ip -netns x link show' ended with status 2: no way"):
        iproute.ip("link show", namespace="x")


def test_verbs_on_a_cluster_that_does_not_run_are_refused(
    no_clusters: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cut", "1"]) == 2
    assert "no emulated cluster is running" in capsys.readouterr().err


def test_verbs_need_a_name_where_several_clusters_run(no_clusters: None) -> None:
    for name in ("first", "second"):
        registry.enter(Network(name=name, nodes=1))
    with pytest.raises(ValueError, match="several clusters are running; choose with --name one of first, second"):
        registry.find(None)
    with pytest.raises(ValueError, match="name='third' is not a running cluster; use one of first, second"):
        registry.find("third")
    assert registry.find("second").network == Network(name="second", nodes=1)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(ValueError, match="command is empty; give the program and its arguments"):
        EmulatedCluster(1).start([])


def test_counters_of_an_interface_that_is_not_here_are_refused() -> None:
    with pytest.raises(ValueError, match=r"interface='eth99' is not here; use one of .*lo"):
        sent_bytes("eth99")
