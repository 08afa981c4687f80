"""What keepers accept from a socket: a process that knows the token, and headers of a bounded size."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from lightning_mics.in_memory.keeper.wire import (
    KeeperError,
    prove_as_client,
    prove_as_keeper,
    receive_header,
    send_header,
)


def handshake(of_client: bytes, of_keeper: bytes) -> list[BaseException | None]:
    """The errors of both sides of a handshake with these tokens."""
    client, keeper = socket.socketpair()
    errors: list[BaseException | None] = [None, None]

    def serve() -> None:
        try:
            prove_as_keeper(keeper, of_keeper)
        except ConnectionError as error:
            errors[1] = error
        keeper.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        prove_as_client(client, of_client)
    except KeeperError as error:
        errors[0] = error
    thread.join()
    return errors


def test_both_sides_prove_that_they_know_the_token() -> None:
    assert handshake(b"secret", b"secret") == [None, None]


def test_another_token_is_found_on_both_sides() -> None:
    client, keeper = handshake(b"secret", b"another")
    assert "its token is another one" in str(client)
    assert "does not know the token" in str(keeper)


def test_a_keeper_that_only_repeats_the_proof_of_the_client_is_found() -> None:
    client, keeper = socket.socketpair()

    def repeat() -> None:
        keeper.sendall(b"\0" * 32)
        received = b""
        while len(received) < 64:
            received += keeper.recv(64)
        keeper.sendall(received[32:])

    thread = threading.Thread(target=repeat)
    thread.start()
    with pytest.raises(KeeperError, match="does not know this job's token"):
        prove_as_client(client, b"secret")
    thread.join()


def test_a_header_arrives_with_the_size_of_its_payload() -> None:
    one, other = socket.socketpair()
    send_header(one, {"do": "ping", "numbers": [1, 2]}, payload_bytes=7)
    assert receive_header(other) == ({"do": "ping", "numbers": [1, 2]}, 7)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (struct.pack("!IQ", 2**31, 0), "bytes was announced"),
        (struct.pack("!IQ", 4, 0) + b"{{{{", "not JSON"),
        (struct.pack("!IQ", 2, 0) + b"[]", "not an object"),
        (struct.pack("!IQ", 9, 0) + b"{}", "closed"),
    ],
)
def test_other_headers_are_rejected(content: bytes, problem: str) -> None:
    one, other = socket.socketpair()
    one.sendall(content)
    one.close()
    with pytest.raises(ConnectionError, match=problem):
        receive_header(other)
