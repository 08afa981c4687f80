"""Sends bytes over TCP between the nodes of a cluster and prints what arrived how fast; run on every node.

python traffic_script.py exchange BYTES   every node sends to the next one
python traffic_script.py gather BYTES     every other node sends to node 0
python traffic_script.py stream           node 1 sends to node 0 until it is killed
python traffic_script.py reach            whether node 0 answers within half a second
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script, in a process of its own

from benchmarks.link_counters import received_bytes, sent_bytes

PORT = 7000
NODE, NODES = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])


def connect(node: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((f"node{node}", PORT))
        except ConnectionRefusedError:  # it has not begun to listen
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def send(node: int, size: int) -> None:
    with connect(node) as connection:
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # the other side closes when it has everything


def receive(connection: socket.socket) -> int:
    total = 0
    with connection:
        while chunk := connection.recv(1 << 20):
            total += len(chunk)
    return total


def transfer(server: socket.socket, *, to: int | None, senders: int, size: int) -> None:
    with ThreadPoolExecutor() as threads:
        sending = [threads.submit(send, to, size)] if to is not None else []
        connections = [server.accept()[0] for _ in range(senders)]
        begun = time.monotonic()
        received = sum(threads.map(receive, connections))
        mbit = received * 8e-6 / (time.monotonic() - begun)
        for sent in sending:
            sent.result()
    counters = {"sent_bytes": sent_bytes("eth0"), "received_bytes": received_bytes("eth0")}
    print(json.dumps({"received": received, "mbit": mbit, **counters}))


def stream(server: socket.socket) -> None:
    if NODE == 0:
        receive(server.accept()[0])
    connection = connect(0)
    while True:
        connection.sendall(bytes(4096))


def main(pattern: str, size: str = "0") -> None:
    if pattern == "reach":
        socket.create_connection(("node0", PORT), timeout=0.5)
        return
    with socket.create_server(("", PORT)) as server:
        if pattern == "stream":
            stream(server)
        elif pattern == "exchange":
            transfer(server, to=(NODE + 1) % NODES, senders=1, size=int(size))
        else:
            transfer(server, to=0 if NODE else None, senders=0 if NODE else NODES - 1, size=int(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
