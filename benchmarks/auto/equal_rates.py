"""How slow the network may be for "auto" to be as fast as FSDP2 is at the network's own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.auto.pairs import ON_HOST, ModelPlans, label
from recipes.job.cluster_plan import hardware_of

JOBS = (  # model, cluster and further overrides
    ("gpt-100b", "p4d_64", ("global_batch_size=32768",)),
    ("gpt-100b", "p4d_64", ()),
    ("gpt-175b", "p4de_16", ()),
    ("bert-50b", "p3dn_16", ()),
    ("llama-70b", "p4de_16", ()),
    ("llama-70b", "p5_8", ()),
    ("llama-8b", "p5_8", ()),
)
SERIES = (  # color, whether its numbers are above the points, name
    ("#e07b39", True, "FSDP2"),
    ("#2b5c8a", False, "auto"),
    ("#5b9a68", True, "auto, with host memory"),
)
PRECISION = 1.01  # ratio of two rates that are not told apart
SLOWEST_GBITS = 1.0


def least_rate(is_as_fast: Callable[[float], bool], *, own: float) -> float:
    """The lowest rate at which a plan is as fast, within 1 %, in Gbit/s.

    Args:
        is_as_fast: Whether the plan at a rate is as fast; true at ``own``.
        own: Rate of the network, in Gbit/s.
    """
    low, high = SLOWEST_GBITS, own
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_as_fast(middle) else (middle, high)
    return high


def equal_rates(jobs: Sequence[tuple[str, str, Sequence[str]]] = JOBS) -> Iterator[dict[str, Any]]:
    """For each job, the rates at which "auto" takes as long as FSDP2 with its defaults does at the network's own.

    Args:
        jobs: Model, cluster and overrides of each job.

    Yields:
        The job, the network's own rate and the lower ones, without and with host memory.
    """
    for model, cluster, overrides in jobs:
        plans = ModelPlans(model, overrides)
        own = hardware_of(plans.config(cluster).cluster).network_rate_gbits_per_s
        seconds = plans.plan(cluster, own).baseline.seconds.expected
        found = {"model": model, "cluster": cluster, "overrides": list(overrides), "own_mbit_per_s": 1000 * own}
        for name, each in (("mbit_per_s", plans), ("on_host_mbit_per_s", ModelPlans(model, (*overrides, *ON_HOST)))):
            found[name] = 1000 * least_rate(partial(_is_as_fast, each, cluster, seconds), own=own)
        yield found


def _is_as_fast(plans: ModelPlans, cluster: str, seconds: float, rate: float) -> bool:
    best = plans.plan(cluster, rate).recommended
    return best.fits and best.seconds.expected <= seconds


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the rates of each job.

    Args:
        rows: Rows of :func:`equal_rates`.
        file: Picture to write, as SVG.
    """
    figure = Figure(figsize=(9, 0.6 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot(xlabel="rate of a node's network, Gbit/s, logarithmic")
    axes.set_title(
        "Equal seconds per step, as planned: FSDP2 at full rate, auto at a lower one", loc="left", fontsize=11
    )
    for place, row in enumerate(reversed(rows)):
        rates = [row[name] / 1000 for name in ("own_mbit_per_s", "mbit_per_s", "on_host_mbit_per_s")]
        axes.plot(rates, [place] * 3, color="#bbb", zorder=1)
        for rate, (color, above, _) in zip(rates, SERIES, strict=True):
            axes.scatter(rate, place, color=color, zorder=2)
            offset = (0, 6 if above else -13)
            axes.annotate(f"{rate:.0f}", (rate, place), offset, textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label(row) for row in reversed(rows)])
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    for color, _, name in SERIES:
        axes.scatter([], [], color=color, label=name)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=len(SERIES))
    figure.savefig(file, metadata={"Date": None})
