"""How slow the network may be for "auto" to be as fast as FSDP2 is at the network's own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.auto.pairs import ON_HOST, ModelPlans
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
        The job, the network's own rate and the lower ones, without and with inputs of blocks on the host.
    """
    for model, cluster, overrides in jobs:
        plans = ModelPlans(model, overrides)
        own = hardware_of(plans.config(cluster).cluster).network_rate_gbits_per_s
        seconds = plans.plan(cluster, own).baseline.seconds.expected
        found = {"model": model, "cluster": cluster, "overrides": list(overrides), "own_gbits_per_s": own}
        for name, each in (("gbits_per_s", plans), ("on_host_gbits_per_s", ModelPlans(model, (*overrides, ON_HOST)))):
            found[name] = least_rate(partial(_is_as_fast, each, cluster, seconds), own=own)
        yield found


def _is_as_fast(plans: ModelPlans, cluster: str, seconds: float, rate: float) -> bool:
    best = plans.plan(cluster, rate).recommended
    return best.fits and best.seconds.expected <= seconds


def label(row: dict[str, Any]) -> str:
    """A job in a few words."""
    batch = f", {row['overrides'][0].removeprefix('global_batch_size=')} sequences" if row["overrides"] else ""
    return f"{row['model']} on {row['cluster']}{batch}"


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
        rates = (row["own_gbits_per_s"], row["gbits_per_s"], row["on_host_gbits_per_s"])
        axes.plot(rates, [place] * 3, color="#bbb", zorder=1)
        for rate, color in zip(rates, ("#e07b39", "#2b5c8a", "#5b9a68"), strict=True):
            axes.scatter(rate, place, color=color, zorder=2)
            axes.annotate(f"{rate:.0f}", (rate, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label(row) for row in reversed(rows)])
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    for color, name in (("#e07b39", "FSDP2"), ("#2b5c8a", "auto"), ("#5b9a68", "auto, inputs of blocks on the host")):
        axes.scatter([], [], color=color, label=name)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(file, metadata={"Date": None})
