"""A request to a keeper, and its payload."""

from __future__ import annotations

import socket
from typing import Any

from lightning_mics.in_memory.keeper.wire import receive, receive_into

DRAINED_AT_ONCE_BYTES = 2**20


class Request:
    """A request whose payload has not been received yet, so that it can go where it belongs.

    Args:
        connection: Connection that it came from.
        header: What should be done, with its arguments.
        payload_bytes: Size of the payload.
        process: Process that asks, on this node; 0 for others.
    """

    def __init__(self, connection: socket.socket, header: dict[str, Any], payload_bytes: int, process: int) -> None:
        self.connection = connection
        self.header = header
        self.process = process
        self._left = payload_bytes

    def payload(self, *, most: int) -> bytes:
        """The payload, which must not have more than ``most`` bytes."""
        if self._left > most:
            raise ConnectionError(f"{self._left} bytes were announced")
        return self.part_of_payload(self._left)

    def part_of_payload(self, count: int) -> bytes:
        """The next ``count`` bytes of the payload."""
        if count > self._left:
            raise ConnectionError(f"{self._left} bytes were announced instead of {count}")
        self._left -= count
        return receive(self.connection, count)

    def fill(self, target: memoryview) -> None:
        """Receive the next bytes of the payload into ``target``."""
        if target.nbytes > self._left:
            raise ConnectionError(f"{self._left} bytes were announced instead of {target.nbytes}")
        self._left -= target.nbytes
        receive_into(self.connection, target)

    def drain(self) -> None:
        """Receive what nobody wants, so that the next request is where it should be."""
        while self._left:
            self.part_of_payload(min(self._left, DRAINED_AT_ONCE_BYTES))
