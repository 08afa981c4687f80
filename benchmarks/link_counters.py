"""The counters of this machine's network interfaces, or of the network namespace this process is in.

Nothing but the standard library is imported, so that a program in any environment can read its own link.
"""

from __future__ import annotations

from pathlib import Path

_TABLE = Path("/proc/self/net/dev")
_SENT = 8  # a row is: eight columns of receiving, then eight of sending; bytes come first in both, then packets

HEADER_BYTES = 14 + 20 + 32  # of Ethernet, IPv4, and TCP with timestamps


def received_bytes(interface: str) -> int:
    """Bytes that ``interface`` has received since it exists, packet headers included."""
    return _row(interface)[0]


def sent_bytes(interface: str) -> int:
    """Bytes that ``interface`` has sent since it exists, packet headers included."""
    return _row(interface)[_SENT]


def sent_values(interface: str) -> int:
    """Bytes of TCP's values that ``interface`` has sent since it exists, without headers; what is sent again counts."""
    sent, packets = _row(interface)[_SENT : _SENT + 2]
    return sent - packets * HEADER_BYTES


def _row(interface: str) -> list[int]:
    lines = _TABLE.read_text().splitlines()[2:]  # two lines of headings
    rows = {name.strip(): columns for name, _, columns in (line.partition(":") for line in lines)}
    if interface not in rows:
        raise ValueError(f"interface={interface!r} is not here; use one of {', '.join(sorted(rows))}")
    return [int(column) for column in rows[interface].split()]
