"""Pictures of what was measured over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Series = dict[str, list[tuple[int, float]]]  # by name: (step, value)


References = Mapping[str, Mapping[str, float]]  # by name of a series: labels and values of lines across its panel


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of one quantity.

    Attributes:
        title: Name of the quantity.
        unit: Unit of its axis.
        lines: Label of each line by the name of its series.
        from_zero: Whether the axis begins at zero, as it should where sizes are compared.
    """

    title: str
    unit: str
    lines: dict[str, str]
    from_zero: bool = False


LOSSES = Panel(title="Loss", unit="nats per token", lines={"train_loss": "training", "val_loss": "validation"})


PANELS = [
    LOSSES,
    Panel(title="Accuracy on masked tokens", unit="share", lines={"val_masked_accuracy": ""}, from_zero=True),
    Panel(title="Throughput, all ranks", unit="tokens/s", lines={"tokens_per_s": ""}, from_zero=True),
    Panel(
        title="Arithmetic, each rank",
        unit="TFLOPS",
        lines={"hfu_tflops_per_gpu": "with recomputation (HFU)", "mfu_tflops_per_gpu": "of the model (MFU)"},
        from_zero=True,
    ),
    Panel(title="Gradient norm before clipping", unit="2-norm", lines={"grad_norm": ""}, from_zero=True),
    Panel(title="Learning rate", unit="lr", lines={"lr": ""}, from_zero=True),
    Panel(
        title="Peak memory of a rank",
        unit="GiB",
        lines={"peak_memory_gib": "most", "least_peak_memory_gib": "least"},
        from_zero=True,
    ),
]


STYLES = (("#2b5c8a", "-"), ("#e07b39", "--"))  # of two lines, one may hide behind the other; and not red and green


def draw(series: Series, panels: Sequence[Panel], *, references: References | None = None) -> Any:
    """A figure with those of ``panels`` that have points.

    Args:
        series: Measured series.
        panels: Panels to draw, two in a row.
        references: Baselines of series.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure  # not pyplot, which picks a display; imported late, for it is slow

    panels = [panel for panel in panels if any(series.get(name) for name in panel.lines)]
    columns = min(2, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7, 4) if rows <= 1 and columns == 1 else (11, 3 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(rows, columns, place), panel, series, references or {})
    return figure


def _draw_panel(axes: Any, panel: Panel, series: Series, references: References) -> None:
    drawn = {name: label for name, label in panel.lines.items() if series.get(name)}
    for (name, label), (color, style) in zip(drawn.items(), STYLES, strict=False):
        points = list(zip(*series[name], strict=True))
        style = "o-" if name.startswith("val_") else style
        axes.plot(*points, style, label=label or None, color=color, markersize=4, linewidth=1.6)
    for label, value in (line for name in drawn for line in references.get(name, {}).items()):
        axes.axhline(value, linestyle=":", color="#555", linewidth=1.2)
        readable = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(label, (1, value), fontsize=8, bbox=readable, **place)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set(xlabel="optimizer step", ylabel=panel.unit)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    if panel.from_zero:
        finite = (value for name in drawn for _, value in series[name] if math.isfinite(value))
        axes.set_ylim(bottom=0, top=1.1 * max(finite, default=0) or 1)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(drawn.values()):
        axes.legend(frameon=False, fontsize=9)
