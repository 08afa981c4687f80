"""The plots of the result page: step time and bytes on the link against micro-steps, one file per shape.

Columns hold the systems whose model states reach equally far, rows hold rates: no panel has more lines than can be told
apart. Ours are drawn thick, peers thin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.comparison.measurements import OURS, Measurements, Setting, Spread, is_ours

COLUMNS = {"node": "one node", "two-nodes": "two nodes", "world": "all nodes"}  # what a replica reaches over
_MARKERS = "osD^vP*X<>hp"
_OWN_COLORS = ("#f4a582", "#d6604d", "#fdae61", "#b2182b", "#67001f")
_PEER_COLORS = ("#2166ac", "#1b7837", "#762a83", "#4d4d4d", "#35978f", "#8c510a", "#5aae61", "#9970ab", "#878787")


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """What a plot shows, and the least that is possible."""

    name: str
    label: str
    figures: Callable[[str, Setting], Spread | None]
    scale: float
    least: Callable[[float], float]  # of a rate in Mbit/s
    least_label: str


def draw(measurements: Measurements, folder: Path) -> list[Path]:
    """Draw all plots and return their files."""
    style: Any = {
        "svg.hashsalt": "comparison",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        return [
            _draw(measurements, shape, quantity, folder)
            for shape in measurements.shapes
            for quantity in _quantities(measurements, shape)
        ]


def _quantities(measurements: Measurements, shape: str) -> tuple[_Quantity, _Quantity]:
    least = measurements.least_bytes(shape)
    return (
        _Quantity(
            name="step-time",
            label="seconds per step",
            figures=measurements.step_seconds,
            scale=1,
            least=lambda rate: least * 8 / (rate * 1e6),
            least_label="the least bytes at this rate (computed)",
        ),
        _Quantity(
            name="bytes",
            label="MB sent per node and step",
            figures=measurements.step_bytes,
            scale=1e-6,
            least=lambda rate: least * 1e-6,
            least_label="the least bytes (computed)",
        ),
    )


def _draw(measurements: Measurements, shape: str, quantity: _Quantity, folder: Path) -> Path:
    reaches = [reach for reach in OURS if measurements.systems(shape, reach=reach)]
    rates = measurements.facts["rates_mbit"]
    looks = _looks(measurements.systems())
    size = (4.2 * len(reaches), 3.2 * len(rates) + 1.5)
    figure, grid = plt.subplots(len(rates), len(reaches), figsize=size, squeeze=False, sharey="row")
    for row, rate in zip(grid, rates, strict=True):
        for axes, reach in zip(row, reaches, strict=True):
            lines = _lines(measurements, quantity, measurements.systems(shape, reach=reach), shape, rate)
            _panel(axes, lines, looks, micro_steps=measurements.facts["micro_steps"])
            axes.axhline(quantity.least(rate), color="black", linestyle=":", linewidth=1, label=quantity.least_label)
            axes.set_title(f"replicas over {COLUMNS[reach]}, {rate:g} Mbit/s")
        row[0].set_ylabel(quantity.label)
    for axes in grid[-1]:
        axes.set_xlabel("micro-steps per optimizer step")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    figure.tight_layout()
    file = folder / f"{quantity.name}-{shape}.svg"
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return file


def _lines(
    measurements: Measurements, quantity: _Quantity, systems: list[str], shape: str, rate: float
) -> dict[str, dict[int, Spread]]:
    """``{system: {micro-steps: figure}}``, without what was not measured."""
    settings = [Setting(shape=shape, rate_mbit=rate, micro_steps=s) for s in measurements.facts["micro_steps"]]
    return {
        system: {
            setting.micro_steps: spread.times(quantity.scale)
            for setting in settings
            if (spread := quantity.figures(system, setting)) is not None
        }
        for system in systems
    }


def _looks(systems: list[str]) -> dict[str, dict[str, Any]]:
    """A color and a marker per system, the same wherever its replicas reach to."""
    families = {system: system.partition("@")[0] for system in systems}
    own = sorted({family for system, family in families.items() if is_ours(system)})
    peers = sorted({family for system, family in families.items() if not is_ours(system)})
    colors = {**dict(zip(own, cycle(_OWN_COLORS))), **dict(zip(peers, cycle(_PEER_COLORS)))}
    markers = dict(zip([*own, *peers], cycle(_MARKERS)))
    widths = {True: {"linewidth": 2.6, "zorder": 3}, False: {"linewidth": 1.2, "zorder": 2}}
    return {
        system: {"color": colors[family], "marker": markers[family], **widths[is_ours(system)]}
        for system, family in families.items()
    }


def _panel(
    axes: Axes, lines: dict[str, dict[int, Spread]], looks: dict[str, dict[str, Any]], *, micro_steps: list[int]
) -> None:
    for system, points in lines.items():
        medians = [spread.median for spread in points.values()]
        below = [spread.median - spread.least for spread in points.values()]
        above = [spread.greatest - spread.median for spread in points.values()]
        style = {"elinewidth": 1, "markersize": 5, **looks[system]}
        axes.errorbar(list(points), medians, yerr=[below, above], label=system, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(micro_steps, [str(s) for s in micro_steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
