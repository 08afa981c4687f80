"""Messages between ranks and keepers: a header in JSON and raw bytes, once both sides have proved to know a token.

Nothing that is received is unpickled, and lengths are bounded before memory is allocated. The bytes are not encrypted,
as those of NCCL and gloo are not.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from typing import Any

MOST_HEADER_BYTES = 2**26
_FRAME = struct.Struct("!IQ")  # bytes of the header, bytes of the payload
_NONCE_BYTES = 32


class KeeperError(RuntimeError):
    """A keeper cannot be reached, does not trust this process, or cannot do what it was asked for."""

    raised_by_all_ranks = True  # unchanged, if one rank finds it: see `collectives.agreement`


class KeeperLostError(KeeperError):
    """The connection to a keeper was lost, or never made: it may have died."""


def send_header(connection: socket.socket, header: dict[str, Any], *, payload_bytes: int = 0) -> None:
    """Send a header, which announces a payload.

    Args:
        connection: Connected socket.
        header: Plain data.
        payload_bytes: Size of the payload that the caller sends next.
    """
    content = json.dumps(header).encode()
    connection.sendall(_FRAME.pack(len(content), payload_bytes) + content)


def receive_header(connection: socket.socket) -> tuple[dict[str, Any], int]:
    """Receive a header and the size of the payload that follows it, bytes.

    Raises:
        ConnectionError: If the other side has closed the connection, or sent something else.
    """
    size, payload_bytes = _FRAME.unpack(receive(connection, _FRAME.size))
    if size > MOST_HEADER_BYTES:
        raise ConnectionError(f"a header of {size} bytes was announced")
    try:
        header = json.loads(receive(connection, size))
    except ValueError as error:
        raise ConnectionError(f"a header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ConnectionError("a header is not an object")
    return header, payload_bytes


def receive(connection: socket.socket, count: int) -> bytes:
    """Receive exactly ``count`` bytes.

    Args:
        connection: Connected socket.
        count: Number of bytes, checked by the caller.

    Raises:
        ConnectionError: If the connection ends before.
    """
    content = bytearray(count)
    receive_into(connection, memoryview(content))
    return bytes(content)


def receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fill ``target`` with what is received.

    Args:
        connection: Connected socket.
        target: Writable memory: [bytes].

    Raises:
        ConnectionError: If the connection ends before.
    """
    while target.nbytes:
        count = connection.recv_into(target)
        if not count:
            raise ConnectionError("the connection was closed")
        target = target[count:]


def prove_as_client(connection: socket.socket, token: bytes) -> None:
    """Prove to a keeper that this process knows the token, and let it prove the same.

    Args:
        connection: Socket that has just connected.
        token: Secret of the job.

    Raises:
        KeeperError: If the tokens differ.
    """
    theirs, own = receive(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(own + _proof(token, b"client", theirs + own))
    try:
        answer = receive(connection, hashlib.sha256().digest_size)
    except ConnectionError:
        raise KeeperError("the keeper closed the connection: its token is another one") from None
    if not hmac.compare_digest(answer, _proof(token, b"keeper", theirs + own)):
        raise KeeperError("the keeper does not know this job's token")


def prove_as_keeper(connection: socket.socket, token: bytes) -> None:
    """The other side of :func:`prove_as_client`.

    Args:
        connection: Socket that was just accepted.
        token: Secret of the job.

    Raises:
        ConnectionError: If the client does not know the token.
    """
    own = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(own)
    theirs = receive(connection, _NONCE_BYTES)
    if not hmac.compare_digest(
        receive(connection, hashlib.sha256().digest_size), _proof(token, b"client", own + theirs)
    ):
        raise ConnectionError("a client does not know the token")
    connection.sendall(_proof(token, b"keeper", own + theirs))


def _proof(token: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.new(token, side + nonces, hashlib.sha256).digest()
