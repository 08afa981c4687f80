"""Rates of links as people type them, and the token bucket that holds a link to one."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LOWEST, _HIGHEST = 10**6, 100 * 10**9

# With segmentation offload, which saves the processor most of the work, TCP hands a link packets of up to 64 KiB. A
# bucket must hold more than one, or the kernel cuts them up again. 2 ms more make up for a busy machine that refills
# it late. A link that was idle sends this much at once, so it is no larger than it must be.
_LARGEST_PACKETS = 2 * 64 * 1024
_LATENESS_SECONDS = 0.002

# What may wait in front of a link: room for several senders at once, with few packets lost.
_QUEUE_SECONDS = 0.05
_SHORTEST_QUEUE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TokenBucket:
    """The options of ``tc``'s ``tbf`` for one rate."""

    rate_bits: int
    burst_bytes: int
    queue_bytes: int

    @property
    def tc_options(self) -> list[str]:
        """As ``tc`` wants them."""
        return f"rate {self.rate_bits}bit burst {self.burst_bytes} limit {self.queue_bytes}".split()


def bits_per_second(rate: str) -> int:
    """``"200mbit"`` -> 200 000 000.

    Raises:
        ValueError: If ``rate`` is not a number with a unit, or out of range.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.strip().lower())
    if not match:
        raise ValueError(f"rate={rate!r} is not a rate; write a number and one of kbit, mbit, gbit, such as '200mbit'")
    bits = round(float(match[1]) * _UNITS[match[2]])
    if not _LOWEST <= bits <= _HIGHEST:
        raise ValueError(f"rate={rate!r} is out of range; use '1mbit' to '100gbit', or no rate to leave links unshaped")
    return bits


def token_bucket(rate: str) -> TokenBucket:
    """The bucket that holds a link to ``rate`` and lets TCP reach it."""
    bits = bits_per_second(rate)
    return TokenBucket(
        rate_bits=bits,
        burst_bytes=_LARGEST_PACKETS + int(bits / 8 * _LATENESS_SECONDS),
        queue_bytes=max(_SHORTEST_QUEUE_BYTES, int(bits / 8 * _QUEUE_SECONDS)),
    )
