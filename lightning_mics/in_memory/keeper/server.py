"""The keeper's process: what it does for the ranks of its node and for the keepers of others.

Ranks of the node connect over a Unix socket, of the same user only; they write into memory that they share with the
keeper. Everybody else connects over TCP, and may read, or send what another node must keep, but not write into slots.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from lightning_mics.in_memory.keeper.client import KeeperSettings
from lightning_mics.in_memory.keeper.forwarding import Forwarding
from lightning_mics.in_memory.keeper.memory import (
    CRC_BYTES,
    Area,
    Keep,
    Slot,
    Stamp,
    block_count,
    layout_digest,
    layouts_of,
)
from lightning_mics.in_memory.keeper.request import Request
from lightning_mics.in_memory.keeper.watching import Watching
from lightning_mics.in_memory.keeper.wire import (
    prove_as_keeper,
    receive_header,
    send_header,
)

HANDSHAKE_SECONDS = 5.0
MOST_TABLES_BYTES = 2**32
GIVE_UP_SECONDS = 2.0  # of failures, after which the other keeper counts as dead
TICK_SECONDS = 0.5

Answer = tuple[dict[str, Any], Sequence[memoryview | bytes]]


class Keeper:
    """Holds slots, serves connections and forwards what another node must have.

    Args:
        settings: Settings of this keeper.
    """

    def __init__(self, settings: KeeperSettings) -> None:
        self._settings = settings
        self._lock = threading.Condition()
        self._areas: list[Area] = []
        self._ranks: dict[int, int] = {}  # rank by process
        self._met: set[int] = set()  # ranks of all starts of the job
        self._last_rank = time.monotonic()
        self._ended = threading.Event()
        self._port = 0  # none
        self._forwarding = Forwarding(settings.token, self._lock)
        self._watching = Watching(
            settings.token, silence_seconds=settings.silence_seconds, outdated=self._end_if_unused
        )
        self._local_only: dict[str, Callable[[Request], Answer | None]] = {
            "hello": self._hello,
            "open": self._open,
            "begin": self._begin,
            "commit": self._commit,
            "wait": self._wait,
            "peers": self._peers,
            "forget": self._forget,
            "stop": self._stop,
        }
        self._for_all: dict[str, Callable[[Request], Answer | None]] = {
            "ping": lambda request: (self._watching.answer(), ()),
            "status": self._status,
            "list": self._list,
            "facts": self._facts,
            "read": self._read,
            "keep": self._keep,
            "put": self._put,
        }

    def run(self) -> None:
        """Serve until a rank says that the job is over, it has gone on without this node, or no rank comes for long.

        Raises:
            OSError: If this job has a keeper on this node already.
        """
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with ExitStack() as sockets:
            sockets.enter_context(closing(unix))
            unix.bind(self._settings.address)
            if self._settings.host:
                tcp = sockets.enter_context(socket.create_server((self._settings.host, 0), backlog=512))
                self._port = int(tcp.getsockname()[1])
                threading.Thread(target=self._accept, args=(tcp, False), daemon=True).start()
            unix.listen(512)
            threading.Thread(target=self._accept, args=(unix, True), daemon=True).start()
            self._forwarding.start()
            while not self._ended.wait(TICK_SECONDS):
                self._watching.look()
                with self._lock:
                    idle = not self._ranks and time.monotonic() - self._last_rank > self._settings.idle_seconds
                if idle:
                    return

    def _accept(self, server: socket.socket, local: bool) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, local), daemon=True).start()

    def _serve(self, connection: socket.socket, local: bool) -> None:
        process = 0
        with closing(connection), suppress(OSError):
            if local:
                process, user = _peer(connection)
                if user != os.getuid():
                    return
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(HANDSHAKE_SECONDS)
            prove_as_keeper(connection, self._settings.token.encode())
            connection.settimeout(None)
            try:
                while True:
                    header, size = receive_header(connection)
                    self._answer(Request(connection, header, size, process), local=local)
            finally:
                self._gone(process)

    def _answer(self, request: Request, *, local: bool) -> None:
        what = str(request.header.get("do"))
        allowed = {**self._for_all, **self._local_only} if local else self._for_all
        try:
            if what not in allowed:
                raise ValueError(f"it does not {what!r} for this connection")
            answered = allowed[what](request)
        except ConnectionError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            request.drain()
            send_header(request.connection, {"error": f"{what}: {error}"})
            return
        request.drain()
        if answered is not None:
            header, parts = answered
            send_header(request.connection, header, payload_bytes=sum(memoryview(part).nbytes for part in parts))
            for part in parts:
                request.connection.sendall(part)

    def _gone(self, process: int) -> None:
        with self._lock:
            self._watching.gone(process)
            if self._ranks.pop(process, None) is not None:
                self._last_rank = time.monotonic()

    # -- for the ranks of this node ----------------------------------------------------------------------------------

    def _hello(self, request: Request) -> Answer:
        rank = int(request.header["rank"])
        with self._lock:
            is_new = rank not in self._met
            self._ranks[request.process] = rank
            self._met.add(rank)
        return {"host": self._settings.host, "port": self._port, "process": os.getpid(), "is_new": is_new}, ()

    def _open(self, request: Request) -> None:
        """Make or find the area of a rank, and send the descriptors of its slots."""
        area = self._area_of(request, local=True)
        send_header(request.connection, {"slot_bytes": area.size_bytes})
        socket.send_fds(request.connection, [b"\0"], [slot.descriptor for slot in area.slots])

    def _area_of(self, request: Request, *, local: bool) -> Area:
        owner = int(request.header["rank"])
        layouts = layouts_of(request.header["parts"], request.payload(most=MOST_TABLES_BYTES))
        layout = layout_digest(layouts)
        with self._lock:
            for area in self._areas:
                if area.local == local and area.owner == owner and area.layout == layout:
                    return area
            self._areas.append(Area(owner, layouts, local=local))
            return self._areas[-1]

    def _begin(self, request: Request) -> Answer:
        """Choose the slot to write, and mark it as empty: not the one with the step that all ranks have."""
        with self._lock:
            area, keep = self._local_area(request), _keep(request.header["keep"])
            self._drop_earlier(area, keep, int(request.header["generation"]))
            number = area.next_slot(keep)
            area.slots[number].clear()
        return {"slot": number}, ()

    def _commit(self, request: Request) -> Answer:
        """Mark the slot that was written as complete, and forward from it."""
        header, checksums = request.header, request.payload(most=MOST_TABLES_BYTES)
        with self._lock:
            area = self._local_area(request)
            slot = area.slots[int(header["slot"])]
            slot.complete(_stamp(header["stamp"]), _sizes(header["sizes"]), checksums)
            parts = [("private", area.owner), *((str(kind), int(rank)) for kind, rank in header["forward"])]
            self._forwarding.add(area, slot, parts, keep=_keep(header["keep"]))
        return {}, ()

    def _wait(self, request: Request) -> Answer:
        """Wait until a step of a rank is protected."""
        wanted, seconds = _stamp(request.header["stamp"]), float(request.header["seconds"])
        until, forwarding = time.monotonic() + seconds, self._forwarding
        with self._lock:
            area = self._local_area(request)
            while area.protected is None or area.protected < wanted:
                now = time.monotonic()
                if now > until or now - (forwarding.failing_since or now) > GIVE_UP_SECONDS:
                    why = forwarding.problem or "it is slow"
                    raise ValueError(f"step {wanted.step} is not on another node: {why}")
                self._lock.wait(timeout=TICK_SECONDS)
        return {}, ()

    def _peers(self, request: Request) -> Answer:
        """Begin a generation: which keeper gets copies, and which one is watched, beside the ranks of this node."""
        header = request.header
        self._forwarding.connect(header["target"])
        with self._lock:
            self._watching.begin(header["watched"], dict(self._ranks), generation=int(header["generation"]))
        return {}, ()

    def _forget(self, request: Request) -> Answer:
        """Drop the steps of earlier generations, and areas without any."""
        first = int(request.header["before"])
        with self._lock:
            self._is_complete(first)
            for area in self._areas:
                for slot in area.slots:
                    if slot.stamp is not None and slot.stamp.generation < first:
                        slot.clear()
            empty = [area for area in self._areas if all(slot.stamp is None for slot in area.slots)]
            self._drop([area for area in empty if not (area.local and area.owner in self._ranks.values())])
        return {}, ()

    def _stop(self, request: Request) -> Answer:
        self._ended.set()
        return {}, ()

    def _local_area(self, request: Request) -> Area:
        """The area that a rank has opened last."""
        owner = int(request.header["rank"])
        found = [area for area in self._areas if area.local and area.owner == owner]
        if not found:
            raise ValueError(f"rank {owner} has opened nothing")
        return found[-1]

    def _drop_earlier(self, area: Area, keep: Keep, generation: int) -> None:
        """Drop areas of other layouts once all ranks have a step of this generation, which is in ``area``."""
        if keep[0] == generation and area.slot_with(keep) is not None:
            self._is_complete(generation)
            same = [one for one in self._areas if one.owner == area.owner and one.local == area.local]
            self._drop([one for one in same if one is not area])

    def _is_complete(self, generation: int) -> None:
        """Note that all ranks have a step of a generation."""
        self._watching.complete_generation = max(generation, self._watching.complete_generation)

    def _end_if_unused(self) -> None:
        """End, as the job has gone on without this node, unless ranks are here to take part in it again."""
        with self._lock:
            if not self._ranks:
                self._ended.set()

    def _drop(self, areas: list[Area]) -> None:
        for area in areas:
            self._areas.remove(area)
            area.close()

    # -- for everybody who knows the token ----------------------------------------------------------------------------

    def _status(self, request: Request) -> Answer:
        with self._lock:
            areas = [
                {
                    "rank": area.owner,
                    "local": area.local,
                    "bytes": 2 * area.size_bytes,
                    "stamps": _stamps(area),
                    "protected": None if area.protected is None else _plain(area.protected),
                }
                for area in self._areas
            ]
            state = {"areas": areas, "ranks": sorted(self._ranks.values()), "problem": self._forwarding.problem}
        return {**state, "target": self._forwarding.target, "process": os.getpid()}, ()

    def _list(self, request: Request) -> Answer:
        with self._lock:
            held = [
                {"kind": kind, "rank": rank, "stamp": _plain(stamp), "bytes": slot.sizes[kind, rank]}
                for area in self._areas
                for stamp, (kind, rank), slot in area.holdings()
            ]
        return {"held": held}, ()

    def _facts(self, request: Request) -> Answer:
        """Size, table and checksums of a part."""
        with self._lock:
            area, slot, key = self._held(request)
            table, checksums = area.parts[key].table, slot.checksums[key]
            size = slot.sizes[key]
        return {"bytes": size, "table_bytes": len(table)}, (table, checksums)

    def _read(self, request: Request) -> Answer:
        """Bytes of a part."""
        first, count = int(request.header["first"]), int(request.header["count"])
        with self._lock:
            area, slot, key = self._held(request)
            if not 0 <= first <= first + count <= slot.sizes[key]:
                raise ValueError(f"bytes {first} to {first + count} of {slot.sizes[key]}")
            content = area.view(slot, key, slot.sizes[key])[first : first + count]
        return {}, (content,)

    def _held(self, request: Request) -> tuple[Area, Slot, tuple[str, int]]:
        wanted, key = _stamp(request.header["stamp"]), (str(request.header["kind"]), int(request.header["rank"]))
        for area in self._areas:
            for stamp, part, slot in area.holdings():
                if stamp == wanted and part == key:
                    return area, slot, part
        raise ValueError(f"it has no {key[0]} part of rank {key[1]} of step {wanted.step}")

    def _keep(self, request: Request) -> Answer:
        """Make or find an area for what another keeper sends."""
        area = self._area_of(request, local=False)
        return {"layout": area.layout}, ()

    def _put(self, request: Request) -> Answer:
        """Receive a step of another node's rank."""
        header = request.header
        sizes, stamp = _sizes(header["sizes"]), _stamp(header["stamp"])
        with self._lock:
            found = [area for area in self._areas if not area.local and area.layout == header["layout"]]
            if not found:
                raise ValueError("it has no area of this layout")
            area, keep = found[0], _keep(header["keep"])
            self._drop_earlier(area, keep, stamp.generation)
            slot = area.slots[area.next_slot(keep)]
            slot.clear()
            targets = [area.view(slot, key, size) for key, size in sizes.items()]
        checksums = request.part_of_payload(sum(CRC_BYTES * block_count(size) for size in sizes.values()))
        for target in targets:
            request.fill(target)
        with self._lock:
            slot.complete(stamp, sizes, checksums)
        return {}, ()


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket."""
    credentials = struct.Struct("3i")
    process, user, _ = credentials.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    )
    return process, user


def _plain(stamp: Stamp) -> list[int]:
    return [stamp.generation, stamp.step, stamp.world_size]


def _stamp(plain: Any) -> Stamp:
    generation, step, world_size = map(int, plain)
    return Stamp(generation, step, world_size)


def _keep(plain: Any) -> Keep:
    generation, step = map(int, plain)
    return generation, step


def _stamps(area: Area) -> list[list[int] | None]:
    return [None if slot.stamp is None else _plain(slot.stamp) for slot in area.slots]


def _sizes(plain: Any) -> dict[tuple[str, int], int]:
    return {(str(kind), int(rank)): int(size) for kind, rank, size in plain}
