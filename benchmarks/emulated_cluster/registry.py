"""Which clusters exist on this machine and which process owns each, so that what a dead one left can be removed.

A cluster is entered before anything of it is made and struck off after everything of it is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.emulated_cluster.network import Network

_FOLDER = Path("/run/emulated-clusters")  # /run is emptied at boot, as network namespaces are


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cluster and its owner; the time the owner started tells it from a later process with the same number."""

    name: str
    nodes: int
    owner: int
    owner_started: int

    @property
    def alive(self) -> bool:
        """Whether the process that made the cluster still runs."""
        return _start_time(self.owner) == self.owner_started

    @property
    def network(self) -> Network:
        """The network of this cluster."""
        return Network(name=self.name, nodes=self.nodes)


def enter(network: Network) -> None:
    """Enter a cluster of this process, after removing what dead clusters have left.

    Raises:
        ValueError: If the name cannot be used, or is in use.
    """
    if not re.fullmatch(r"[a-z0-9-]{1,32}", network.name):
        raise ValueError(f"name={network.name!r} must be 1 to 32 of a-z, 0-9 and '-'")
    owner = os.getpid()
    entry = Entry(name=network.name, nodes=network.nodes, owner=owner, owner_started=_start_time(owner) or 0)
    with _lock():
        _remove_dead()
        for other in _entries():
            if other.name == entry.name:
                raise ValueError(f"a cluster name={entry.name!r} is running (process {other.owner}); use another name")
        written = _FOLDER / f"{entry.name}.new"
        written.write_text(json.dumps(asdict(entry)))
        written.rename(_file(entry.name))  # at once, so that no reader sees half of it


def remove(name: str) -> None:
    """Remove the cluster ``name`` and strike it off; one that is gone already is no error."""
    with _lock():
        for entry in _entries():
            if entry.name == name:
                _remove(entry)


def remove_dead() -> list[str]:
    """Remove what clusters whose owners died have left, and return their names."""
    with _lock():
        return _remove_dead()


def clusters() -> list[Entry]:
    """All clusters of this machine whose owners live."""
    return [entry for entry in _entries() if entry.alive]


def find(name: str | None) -> Entry:
    """The running cluster ``name``, or the only one.

    Raises:
        ValueError: If there is no such cluster, or no name was given and there are several.
    """
    running = {entry.name: entry for entry in clusters()}
    if not running:
        raise ValueError("no emulated cluster is running on this machine; start one with: emulated_cluster run")
    if name is None and len(running) > 1:
        raise ValueError(f"several clusters are running; choose with --name one of {', '.join(sorted(running))}")
    if name is not None and name not in running:
        raise ValueError(f"name={name!r} is not a running cluster; use one of {', '.join(sorted(running))}")
    return running[name] if name is not None else next(iter(running.values()))


@contextmanager
def _lock() -> Iterator[None]:
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with open(_FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when the file is closed, however that happens
        yield


def _remove_dead() -> list[str]:
    dead = [entry for entry in _entries() if not entry.alive]
    for entry in dead:
        _remove(entry)
    return [entry.name for entry in dead]


def _remove(entry: Entry) -> None:
    entry.network.remove()
    _file(entry.name).unlink(missing_ok=True)


def _entries() -> list[Entry]:
    found = []
    for file in sorted(_FOLDER.glob("*.json")):
        try:
            found.append(Entry(**json.loads(file.read_text())))
        except FileNotFoundError:  # struck off meanwhile
            continue
    return found


def _file(name: str) -> Path:
    return _FOLDER / f"{name}.json"


def _start_time(process: int) -> int | None:
    """In ticks since boot, or ``None`` where there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, started = fields[0], int(fields[19])  # columns 3 and 22 of proc(5)
    return None if state in "ZX" else started
