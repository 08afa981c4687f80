"""Seconds of a step without an order of units: what other predictions choose by, to see whether the choice holds.

This was the package's formula before it simulated FSDP2's order. In a micro-step, communication as long as arithmetic
may be hidden, whatever it belongs to, and half of it is expected to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from lightning_mics.cost.hardware import Hardware
from lightning_mics.cost.step_time import HIDDEN_SHARE, Arithmetic, Seconds, collective_seconds, micro_steps_by_kind
from lightning_mics.cost.step_traffic import StepTraffic, When
from lightning_mics.policy import candidates


@contextmanager
def order_free() -> Iterator[None]:
    """Let plans predict seconds by this formula."""
    with patch.object(candidates, "step_seconds", step_seconds):
        yield


def step_seconds(
    traffic: StepTraffic,
    hardware: Hardware,
    ways: Sequence[Arithmetic],
    *,
    ranks_per_node: int | None = None,
    units_ahead: int = 0,
) -> list[Seconds]:
    """Seconds of an optimizer step, as :func:`lightning_mics.cost.step_time.step_seconds` has them.

    Args:
        traffic: Collectives of the step.
        hardware: Hardware of each node.
        ways: Arithmetic between the collectives.
        ranks_per_node: Number of ranks that share the node's network; None is one per GPU.
        units_ahead: Without effect, as there is no order.

    Raises:
        ValueError: If bytes travel to the host, which this formula does not know.
    """
    if any(way.host_bytes for way in ways):
        raise ValueError("the formula without an order has no link to the host")
    totals: Counter[tuple[When, bool]] = Counter()
    for repeated in traffic:
        seconds = collective_seconds(repeated.collective, hardware, ranks_per_node=ranks_per_node)
        inside = repeated.collective.nodes == 1
        totals[repeated.when, inside] += seconds * len(repeated.phases)  # type: ignore[assignment]  # floats too
    return [_of_step(totals, way, hardware) for way in ways]


def _of_step(totals: Counter[tuple[When, bool]], way: Arithmetic, hardware: Hardware) -> Seconds:
    compute = way.micro_step_flops / (hardware.peak_tflops * 1e12 * hardware.kernel_share)
    sums: Counter[str] = Counter()
    for whens, times in micro_steps_by_kind(way.micro_steps).items():
        inside, between = (sum(totals[when, tier] for when in whens) for tier in (True, False))
        hidden = min(compute, inside + between)
        most = compute + inside + between
        parts = {
            "compute": compute,
            "inside": inside,
            "between": between,
            "least": most - hidden,
            "expected": most - HIDDEN_SHARE * hidden,
            "most": most,
        }
        for name, seconds in parts.items():
            sums[name] += times * seconds  # type: ignore[assignment]
    return Seconds(**sums)
