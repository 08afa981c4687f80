"""A server of the S3 protocol on this machine, and faults on the way to it.

The server, and a proxy before it, run as threads of the process that runs the tests; ranks are forked from it and find
the proxy in their environment.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "checkpoints"


class Fault:
    """What goes wrong with requests of a given kind; ranks and the proxy share it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._beginning: Any = context.Array("c", 200)
        self._answers: Any = context.Value("b", False)
        self._hits: Any = context.Value("i", 0)

    @contextmanager
    def cutting(self, beginning: str, *, answers: bool = False) -> Iterator[None]:
        """Cut each connection in the middle of such a request, or before the answer to it, as long as this is open.

        Args:
            beginning: Beginning of the request, as in ``PUT /bucket/name``; a regular expression.
            answers: Whether requests arrive, and nothing comes back.
        """
        self._answers.value, self._hits.value = answers, 0
        self._beginning.value = beginning.encode()
        try:
            yield
        finally:
            self._beginning.value = b""

    @property
    def hits(self) -> int:
        """How many connections have been cut since then."""
        return int(self._hits.value)

    @property
    def of_answers(self) -> bool:
        """Whether requests arrive."""
        return bool(self._answers.value)

    def is_in(self, beginning: bytes) -> bool:
        """Whether this request is one of them."""
        return bool(self._beginning.value) and re.match(self._beginning.value, beginning) is not None

    def count(self) -> None:
        """One more."""
        with self._hits.get_lock():
            self._hits.value += 1


class Proxy:
    """Hands on what it gets to another port of this machine, except where there is a fault.

    Args:
        port: Port of the server.
        fault: What goes wrong.
    """

    def __init__(self, port: int, fault: Fault) -> None:
        self._server_port = port
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                _Connection(client, server, self._fault).start()


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        self._client = client
        self._server = server
        self._fault = fault
        self._doomed = False

    def start(self) -> None:
        for pump in (self._requests, self._answers):
            threading.Thread(target=pump, daemon=True).start()

    def _requests(self) -> None:
        with suppress(OSError):
            while part := self._client.recv(2**16):
                head, _, body = part.partition(b"\r\n\r\n") if self._fault.is_in(part) else (b"", b"", part)
                self._doomed = self._doomed or bool(head)
                if self._doomed and body and not self._fault.of_answers:
                    self._server.sendall(part[: -(len(body) + 1) // 2])
                    break
                self._server.sendall(part)
        self._cut()

    def _answers(self) -> None:
        with suppress(OSError):
            while part := self._server.recv(2**16):
                go_on = part.startswith(b"HTTP/1.1 100 ")
                if self._doomed and self._fault.of_answers and not go_on:
                    break
                self._client.sendall(part)
        self._cut()

    def _cut(self) -> None:
        if self._doomed:
            self._doomed = False
            self._fault.count()
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing alone would wait for the ranks that have inherited it


@pytest.fixture(scope="module")
def fault() -> Fault:
    """What goes wrong on the way to the server of :func:`s3`."""
    return Fault()


@pytest.fixture(scope="module")
def s3(fault: Fault) -> Iterator[str]:
    """The URL of an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1], fault)
    who = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_MAX_ATTEMPTS": "1"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or each request is a line
    with mock.patch.dict(os.environ, {**who, **where}):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    proxy.close()
    server.stop()
