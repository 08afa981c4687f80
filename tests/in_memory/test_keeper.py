"""A keeper's process: what it does for the ranks of its node, for other keepers, and for nobody else."""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.in_memory.keeper.client import KeeperConnection, KeeperSettings, connect_or_start
from lightning_mics.in_memory.keeper.memory import PartLayout
from lightning_mics.in_memory.keeper.wire import KeeperError
from lightning_mics.in_memory.slots import checksums_of

STAMP = [1, 5, 4]
Start = Callable[..., tuple[KeeperConnection, KeeperSettings]]


def settings(name: str, **options: Any) -> KeeperSettings:
    own = {"token": "secret", "host": "127.0.0.1", **options}
    return KeeperSettings(name=f"test-{name}-{secrets.token_hex(4)}", **own)


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a keeper; all that were started are ended."""
    started: list[KeeperSettings] = []

    def start(name: str = "node", **options: Any) -> tuple[KeeperConnection, KeeperSettings]:
        own = settings(name, **options)
        connection = connect_or_start(own, starts=True)
        started.append(own)
        return connection, own

    yield start
    for own in started:
        try:
            KeeperConnection.local(own).ask({"do": "stop"})
        except (OSError, KeeperError):  # it has died in the test
            continue


def hello(connection: KeeperConnection, rank: int = 0) -> dict[str, Any]:
    return connection.ask({"do": "hello", "rank": rank})[0]


def begin(connection: KeeperConnection, other: dict[str, Any] | None, *, generation: int = 1) -> None:
    """Begin a start of the job, in which this keeper sends to another one and watches it."""
    address = None if other is None else [other["host"], other["port"]]
    connection.ask({"do": "peers", "target": address, "watched": address, "generation": generation})


def open_area(connection: KeeperConnection, rank: int = 0, size: int = 100) -> list[mmap.mmap]:
    parts = [PartLayout("private", rank, size, b"private"), PartLayout("rows", rank, size, b"rows")]
    answer, _ = connection.ask(
        {"do": "open", "rank": rank, "parts": [part.plain() for part in parts]}, *(part.table for part in parts)
    )
    found = []
    for descriptor in connection.receive_descriptors(2):
        found.append(mmap.mmap(descriptor, answer["slot_bytes"]))
        os.close(descriptor)
    return found


def commit(
    connection: KeeperConnection, slots: list[mmap.mmap], content: bytes, *, step: int = 5, forward_rows: bool = True
) -> None:
    slot = connection.ask({"do": "begin", "rank": 0, "keep": [1, step - 1], "generation": 1})[0]["slot"]
    for first in (0, 4096):
        slots[slot][first : first + len(content)] = content
    sizes = [["private", 0, len(content)], ["rows", 0, len(content)]]
    stamp = [1, step, 4]
    connection.ask(
        {
            "do": "commit",
            "rank": 0,
            "slot": slot,
            "keep": [1, step - 1],
            "stamp": stamp,
            "sizes": sizes,
            "forward": [["rows", 0]] if forward_rows else [],
        },
        2 * checksums_of(memoryview(content)),
    )
    connection.ask({"do": "wait", "rank": 0, "stamp": stamp, "seconds": 10})


def test_it_is_a_small_process_without_torch(start: Start) -> None:
    connection, _ = start()
    process = Path("/proc", str(hello(connection)["process"]))
    assert "libtorch" not in (process / "maps").read_text()
    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 60_000  # kB
    assert b"secret" not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()


def test_it_outlives_its_ranks_and_the_next_start_finds_it(start: Start) -> None:
    connection, own = start()
    commit(connection, open_area(connection), b"x" * 50)
    connection.close()
    again = connect_or_start(own, starts=True)
    held = again.ask({"do": "list"})[0]["held"]
    assert held == [{"kind": kind, "rank": 0, "stamp": STAMP, "bytes": 50} for kind in ("private", "rows")]


def test_it_knows_whether_it_has_met_a_rank_before(start: Start) -> None:
    connection, own = start()
    assert hello(connection)["is_new"] and hello(connection, rank=1)["is_new"]
    connection.close()
    again = connect_or_start(own, starts=False)
    assert not hello(again, rank=1)["is_new"] and hello(again, rank=2)["is_new"]


def test_a_part_is_read_over_the_network_as_it_was_written(start: Start) -> None:
    connection, _ = start()
    address = [hello(connection)[key] for key in ("host", "port")]
    commit(connection, open_area(connection), bytes(range(100)))
    part = {"kind": "rows", "rank": 0, "stamp": STAMP}
    remote = KeeperConnection.remote(address, token="secret")
    facts, payload = remote.ask({"do": "facts", **part})
    assert facts == {"bytes": 100, "table_bytes": 4}
    assert payload == b"rows" + checksums_of(memoryview(bytes(range(100))))
    assert remote.ask({"do": "read", **part, "first": 10, "count": 3})[1] == bytes([10, 11, 12])
    with pytest.raises(KeeperError, match="bytes 90 to 110 of 100"):
        remote.ask({"do": "read", **part, "first": 90, "count": 20})
    with pytest.raises(KeeperError, match="no rows part of rank 1"):
        remote.ask({"do": "facts", **part, "rank": 1})
    assert remote.ask({"do": "ping"})[1] == b""  # the connection has survived


@pytest.mark.parametrize("request_", ["hello", "open", "begin", "commit", "wait", "peers", "forget", "stop", "eval"])
def test_over_the_network_nobody_writes_or_ends_it(start: Start, request_: str) -> None:
    connection, _ = start()
    answer = hello(connection)
    remote = KeeperConnection.remote([answer["host"], answer["port"]], token="secret")
    with pytest.raises(KeeperError, match="it does not"):
        remote.ask({"do": request_, "rank": 0}, b"payload")


def test_on_a_single_node_it_does_not_listen_to_the_network(start: Start) -> None:
    connection, _ = start(host="")
    answer = hello(connection)
    assert (answer["host"], answer["port"]) == ("", 0)
    listening = "0A"  # state in the list of sockets
    inodes = {os.readlink(file)[8:-1] for file in Path("/proc", str(answer["process"]), "fd").iterdir()}
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert not [entry for entry in sockets if entry[3] == listening and entry[9] in inodes]


def test_another_token_is_turned_away_on_both_sockets(start: Start) -> None:
    connection, own = start()
    answer = hello(connection)
    wrong = KeeperSettings(own.name, "wrong", own.host)
    with pytest.raises(KeeperError, match="token"):
        KeeperConnection.local(wrong)
    with pytest.raises(KeeperError, match="token"):
        KeeperConnection.remote([answer["host"], answer["port"]], token="wrong")


def test_what_is_forwarded_survives_the_node(start: Start) -> None:
    one, _ = start("one")
    other, _ = start("other")
    answers = [hello(one), hello(other)]
    begin(one, answers[1])
    slots = open_area(one)
    for step in (3, 4, 5):
        commit(one, slots, bytes([step]) * 60, step=step)
    os.kill(answers[0]["process"], signal.SIGKILL)
    held = other.ask({"do": "list"})[0]["held"]
    assert {tuple(entry["stamp"]) for entry in held} == {(1, 4, 4), (1, 5, 4)}
    content = other.ask({"do": "read", "kind": "rows", "rank": 0, "stamp": STAMP, "first": 0, "count": 60})[1]
    assert content == b"\x05" * 60


def test_only_what_has_to_be_sent_is_sent(start: Start) -> None:
    one, _ = start("one")
    other, _ = start("other")
    hello(one)
    answer = hello(other)
    begin(one, answer)
    commit(one, open_area(one), b"x" * 60, forward_rows=False)
    assert [entry["kind"] for entry in other.ask({"do": "list"})[0]["held"]] == ["private"]


def test_a_step_is_not_protected_while_the_other_keeper_is_dead(start: Start) -> None:
    one, _ = start("one")
    other, _ = start("other")
    hello(one)
    answer = hello(other)
    begin(one, answer)
    os.kill(answer["process"], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(KeeperError, match=r"step 5 is not on another node: .*cannot be reached"):
        commit(one, open_area(one), b"x" * 60)
    assert time.monotonic() - begun < 9


def test_earlier_generations_are_forgotten_when_asked(start: Start) -> None:
    connection, own = start()
    commit(connection, open_area(connection), b"x")
    again = connect_or_start(own, starts=False)
    connection.close()
    again.ask({"do": "forget", "before": 1})
    assert len(again.ask({"do": "list"})[0]["held"]) == 2
    again.ask({"do": "forget", "before": 2})
    assert again.ask({"do": "list"})[0]["held"] == []
    assert again.ask({"do": "status"})[0]["areas"] == []  # and their memory


def test_it_ends_by_itself_when_no_rank_comes(start: Start) -> None:
    connection, own = start(idle_seconds=0.5)
    hello(connection)
    time.sleep(1.2)
    KeeperConnection.local(own)  # a rank is connected
    connection.close()
    until = time.monotonic() + 10
    while listens(own):
        assert time.monotonic() < until
        time.sleep(0.1)


def listens(own: KeeperSettings) -> bool:
    try:
        KeeperConnection.local(own).close()
    except (OSError, KeeperError):  # it has ended, or ends while it is asked
        return False
    return True


def forked(act: Callable[[], None]) -> int:
    """A process that does something and ends, whatever happens."""
    process = os.fork()
    if not process:
        try:
            act()
        finally:
            os._exit(1)
    return process


def test_a_rank_that_is_stopped_is_ended(start: Start) -> None:
    connection, own = start(silence_seconds=1.0)

    def act() -> None:
        mine = KeeperConnection.local(own)
        hello(mine, rank=3)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(20)

    process = forked(act)
    os.waitpid(process, os.WUNTRACED)
    begin(connection, None)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_silent_node_is_named_in_the_output_of_ranks_that_are_ended(start: Start, tmp_path: Path) -> None:
    _, own = start(silence_seconds=1.5)
    other, _ = start("other")
    answer = hello(other)

    def act() -> None:
        os.dup2(os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT), 2)
        mine = KeeperConnection.local(own)
        hello(mine)
        begin(mine, answer)
        os.kill(answer["process"], signal.SIGSTOP)  # its kernel accepts connections, and nobody answers
        time.sleep(20)

    process = forked(act)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    os.kill(answer["process"], signal.SIGKILL)
    assert f"the node of 127.0.0.1:{answer['port']} has not answered for" in (tmp_path / "output").read_text()


def test_the_reason_ends_the_ranks_of_the_node_before_too(start: Start, tmp_path: Path) -> None:
    _, own = start()
    connection, of_other = start("other", silence_seconds=1.0)
    answer = hello(connection)
    connection.close()  # else this process counts as a rank, which is ended
    while KeeperConnection.local(of_other).ask({"do": "status"})[0]["ranks"]:
        time.sleep(0.01)

    def wait() -> None:
        os.dup2(os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT), 2)
        mine = KeeperConnection.local(own)
        hello(mine)
        begin(mine, answer)
        time.sleep(20)

    def stop() -> None:
        mine = KeeperConnection.local(of_other)
        hello(mine, rank=2)
        begin(mine, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(20)

    waiting, stopped = forked(wait), forked(stop)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == -signal.SIGKILL
    assert os.waitstatus_to_exitcode(os.waitpid(stopped, 0)[1]) == -signal.SIGKILL
    assert f"rank 2 (process {stopped}) is stopped" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("is_used", [False, True])
def test_a_keeper_without_which_the_job_has_gone_on_ends(start: Start, is_used: bool) -> None:
    outdated, _ = start()
    other, _ = start("other")
    begin(outdated, hello(other))
    if is_used:
        hello(outdated)
    other.ask({"do": "forget", "before": 1})  # all ranks have a step of this start: nothing is outdated
    time.sleep(1.5)
    assert answers(outdated)
    other.ask({"do": "forget", "before": 2})  # all have one of the next start
    until = time.monotonic() + (2.5 if is_used else 10)
    while answers(outdated) and time.monotonic() < until:
        time.sleep(0.1)
    assert answers(outdated) == is_used


def answers(connection: KeeperConnection) -> bool:
    try:
        connection.ask({"do": "ping"})
    except KeeperError:
        return False
    return True
