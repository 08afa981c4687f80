"""A connection to a keeper: of a rank to that of its node or of another one, or of a keeper to another one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mics.in_memory.keeper.wire import (
    KeeperError,
    KeeperLostError,
    prove_as_client,
    receive_header,
    receive_into,
    send_header,
)

CONNECT_SECONDS = 10.0  # until a keeper that was started listens
ANSWER_SECONDS = 60.0
MOST_PAYLOAD_BYTES = 2**40


@dataclass(frozen=True)
class KeeperSettings:
    """What a keeper is started with.

    Attributes:
        name: Name of the job and the node, the same in each start of the job.
        token: Secret of the job.
        host: Address of the interface to listen on; empty on a single node, where only its ranks connect.
        idle_seconds: Time without a rank after which the keeper ends.
        silence_seconds: Time without an answer after which another node counts as dead.
    """

    name: str
    token: str
    host: str
    idle_seconds: float = 1800.0
    silence_seconds: float = 10.0

    @property
    def address(self) -> str:
        """Socket in Linux' abstract namespace, which has no file; one keeper per job, node and user."""
        return f"\0lightning-mics-keeper-{os.getuid()}-{self.name}"


class KeeperConnection:
    """A connection over which one request at a time is made.

    Args:
        connection: Connected socket.
        token: Secret of the job.
        where: The keeper in words, for errors.
    """

    def __init__(self, connection: socket.socket, *, token: str, where: str) -> None:
        self._connection = connection
        self._where = where
        connection.settimeout(ANSWER_SECONDS)
        try:
            prove_as_client(connection, token.encode())
        except OSError as error:
            raise KeeperLostError(f"{where}: {error}") from error

    @classmethod
    def local(cls, settings: KeeperSettings) -> KeeperConnection:
        """Connect to the keeper of this node.

        Raises:
            OSError: If there is none.
            KeeperError: If it has another token.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(settings.address)
        return cls(connection, token=settings.token, where="the keeper of this node")

    @classmethod
    def remote(cls, address: Sequence[Any], *, token: str, seconds: float = CONNECT_SECONDS) -> KeeperConnection:
        """Connect to the keeper of another node.

        Args:
            address: Host and port of the keeper.
            token: Secret of the job.
            seconds: Longest time to connect.

        Raises:
            KeeperError: If it cannot be reached, or has another token.
        """
        host, port = str(address[0]), int(address[1])
        try:
            connection = socket.create_connection((host, port), timeout=seconds)
        except OSError as error:
            raise KeeperLostError(
                f"the keeper at {host}:{port} cannot be reached: {error}; keepers listen on the interface of "
                "MICS_KEEPER_INTERFACE, and its ports must be open between the nodes"
            ) from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection, token=token, where=f"the keeper at {host}:{port}")

    def ask(
        self, request: dict[str, Any], *payload: bytes | memoryview, into: memoryview | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Make a request and return the answer's header and payload.

        Args:
            request: What the keeper should ``do``, with its arguments.
            payload: Bytes that follow the request.
            into: Memory for the answer's payload, [bytes]; then the payload that is returned is empty.

        Raises:
            KeeperError: If the keeper refuses, or the connection is lost.
        """
        try:
            send_header(self._connection, request, payload_bytes=sum(memoryview(part).nbytes for part in payload))
            for part in payload:
                self._connection.sendall(part)
            answer, size = receive_header(self._connection)
            if into is not None and "error" not in answer:
                if size != into.nbytes:
                    raise ConnectionError(f"{size} bytes came instead of {into.nbytes}")
                receive_into(self._connection, into)
                return answer, b""
            if size > MOST_PAYLOAD_BYTES:
                raise ConnectionError(f"an answer of {size} bytes was announced")
            content = bytearray(size)
            receive_into(self._connection, memoryview(content))
        except OSError as error:
            raise KeeperLostError(f"{self._where} does not answer: {error}") from error
        if "error" in answer:
            raise KeeperError(f"{self._where}: {answer['error']}")
        return answer, bytes(content)

    def wait_at_most(self, seconds: float) -> None:
        """Set the longest time of an answer."""
        self._connection.settimeout(seconds)

    def receive_descriptors(self, count: int) -> list[int]:
        """Receive file descriptors that the keeper sends after an answer."""
        _, descriptors, _, _ = socket.recv_fds(self._connection, 1, count)
        if len(descriptors) != count:
            raise KeeperError(f"{self._where} sent {len(descriptors)} descriptors instead of {count}")
        return descriptors

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def connect_or_start(settings: KeeperSettings, *, starts: bool) -> KeeperConnection:
    """Connect to the keeper of this node, and start it if there is none.

    Args:
        settings: Settings of the keeper.
        starts: Whether this process starts it; the others wait for it.

    Raises:
        KeeperError: If it does not listen within :data:`CONNECT_SECONDS`.
    """
    process: subprocess.Popen[bytes] | None = None
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return KeeperConnection.local(settings)
        except (OSError, KeeperLostError) as error:
            if starts and process is None:
                process = start_keeper(settings)
            if time.monotonic() > until or (process is not None and process.poll() not in (None, 0)):
                raise KeeperError(f"no keeper listens on this node: {error}") from error
        time.sleep(0.02)


def start_keeper(settings: KeeperSettings) -> subprocess.Popen[bytes]:
    """Start a keeper that survives this process; the token goes through a pipe, where no other user can read it."""
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {name: value for name, value in os.environ.items() if name != "MICS_KEEPER_TOKEN"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_mics", "keeper", "--settings-from-stdin"],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # launchers end the process groups of ranks
        cwd="/",
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write("\n".join(map(str, _in_order(settings))).encode())
    return process


def _in_order(settings: KeeperSettings) -> tuple[Any, ...]:
    return settings.name, settings.token, settings.host, settings.idle_seconds, settings.silence_seconds


def settings_from(text: str) -> KeeperSettings:
    """The settings that :func:`start_keeper` has written."""
    name, token, host, idle, silence = text.split("\n")
    return KeeperSettings(name, token, host, float(idle), float(silence))
