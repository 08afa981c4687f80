"""The plan and the rehearsal on one page, with pictures."""

from __future__ import annotations

import html
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console

from lightning_mics.cost.step_time import collective_seconds
from lightning_mics.planning import Hardware, Plan, Rehearsal
from recipes.plan.tables import duration, low_bit_line, plan_table, rehearsal_tables, size_label
from recipes.report.page import picture, write_page

BLUE, ORANGE, GREEN, GREY = "#2b5c8a", "#e07b39", "#5b9a68", "#9aa0a6"


def write_plan_page(
    path: Path,
    *,
    title: str,
    command: Sequence[str],
    choices: str,
    planned: Plan | None,
    scaling: Sequence[Plan],
    rehearsal: Rehearsal | None,
    hardware: Hardware | None,
    config: DictConfig,
) -> None:
    """Write the page.

    Args:
        path: Path of the HTML file.
        title: Heading of the page.
        command: Command line, in words.
        choices: Table of the values chosen for "auto".
        planned: Plan of the run; None if the rates of the machines are unknown.
        scaling: Plans for growing clusters.
        rehearsal: Rehearsal of the chosen job; None if it was only planned.
        hardware: Hardware of each node; None without a plan.
        config: Configuration of the run, without "auto".
    """
    body = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(shlex.join(command))}</pre>"]
    if planned is not None and hardware is not None:
        body += [
            "<h2>Plan</h2>",
            f"<p>{html.escape(duration(planned, config))}. Bytes are exact; times are predictions: the "
            "range is from all communication hidden behind arithmetic that can be to none.</p>",
            _as_text(plan_table(planned, config=config)),
            *(f"<p>Note: {html.escape(note)}.</p>" for note in (*planned.warnings, low_bit_line(planned)) if note),
            picture(draw_memory(planned), alt="memory of a rank by partition size"),
            picture(draw_bytes(planned), alt="bytes that a node sends per step by partition size"),
        ]
        if len(scaling) > 1:
            body.append(picture(draw_scaling(scaling), alt="predicted weak scaling"))
        if rehearsal is not None:
            body.append(picture(draw_timeline(rehearsal, planned, hardware), alt="timeline of an optimizer step"))
    if rehearsal is not None:
        capacity_bytes = planned and planned.capacity_bytes
        body += ["<h2>Rehearsal</h2>"]
        body += [_as_text(table) for table in rehearsal_tables(rehearsal, capacity_bytes=capacity_bytes)]
    body += ["<h2>Job</h2>", f"<pre>{html.escape(choices)}</pre>"]
    write_page(path, title=title, body=body)


def draw_memory(planned: Plan) -> Figure:
    """Memory of a rank by partition size: states, caches, activations; against capacity."""
    candidates = sorted(planned.candidates, key=lambda candidate: candidate.topology.partition_size)
    parts = {
        "model states": [candidate.states_bytes for candidate in candidates],
        "cached until the boundary": [candidate.cached_bytes for candidate in candidates],
        "activations": [
            max(0, candidate.memory_bytes - candidate.states_bytes - candidate.cached_bytes) for candidate in candidates
        ],
    }
    figure, axes = _axes("Memory of a rank", "partition size, ranks", "GiB")
    places, bottom = range(len(candidates)), [0.0] * len(candidates)
    for (name, sizes), color in zip(parts.items(), (BLUE, GREEN, ORANGE), strict=True):
        heights = [size / 2**30 for size in sizes]
        axes.bar(places, heights, bottom=bottom, label=name, color=color)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    capacity = planned.capacity_bytes / 2**30
    axes.axhline(capacity, color="#222", linestyle="--", linewidth=1.2, label="capacity of the GPU")
    axes.set_ylim(0, 2.5 * capacity)
    for place, total in zip(places, bottom, strict=True):
        if total > 2.5 * capacity:
            axes.annotate(f"{total:,.0f}", (place, 2.4 * capacity), ha="center", color="white", fontsize=9)
    _label_sizes(axes, candidates, planned)
    return figure


def draw_bytes(planned: Plan) -> Figure:
    """What a node sends per optimizer step, inside and to others, by partition size."""
    candidates = sorted(planned.candidates, key=lambda candidate: candidate.topology.partition_size)
    figure, axes = _axes("Bytes that a node sends per optimizer step", "partition size, ranks", "GB, logarithmic")
    tiers = {"between nodes": (-0.2, ORANGE, "between_bytes"), "inside the node": (0.2, BLUE, "inside_bytes")}
    for name, (offset, color, attribute) in tiers.items():
        heights = [getattr(candidate.node_sent, attribute) / 1e9 for candidate in candidates]
        axes.bar([place + offset for place in range(len(candidates))], heights, 0.4, label=name, color=color)
    axes.axhline(
        planned.baseline.node_sent.between_bytes / 1e9,
        color="#222",
        linestyle="--",
        linewidth=1.2,
        label="between nodes, full sharding",
    )
    axes.set_yscale("log")
    _label_sizes(axes, candidates, planned)
    return figure


def draw_scaling(scaling: Sequence[Plan]) -> Figure:
    """Predicted TFLOPS of a GPU over the size of the cluster, where each rank has as much to do."""
    figure, axes = _axes("Predicted weak scaling", "GPUs", "TFLOPS per GPU (HFU)")
    gpus = [plan.chosen.topology.world_size for plan in scaling]
    for name, color, candidates in (
        ("MiCS", BLUE, [plan.chosen for plan in scaling]),
        ("full sharding", ORANGE, [plan.baseline for plan in scaling]),
    ):
        flops = [candidate.hfu_tflops * candidate.seconds.expected for candidate in candidates]
        axes.plot(gpus, [candidate.hfu_tflops for candidate in candidates], "o-", label=name, color=color)
        least = [value / candidate.seconds.most for value, candidate in zip(flops, candidates, strict=True)]
        most = [value / candidate.seconds.least for value, candidate in zip(flops, candidates, strict=True)]
        axes.fill_between(gpus, least, most, color=color, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def draw_timeline(rehearsal: Rehearsal, planned: Plan, hardware: Hardware) -> Figure:
    """What runs in each micro-step that was rehearsed, priced: arithmetic above, collectives below."""
    figure, axes = _axes(
        "One optimizer step, predicted, where all is hidden that can be: micro-steps that differ", "seconds", ""
    )
    lanes = {"arithmetic": 2, "inside nodes": 1, "between nodes": 0}
    candidate, at = planned.chosen, 0.0
    compute = candidate.seconds.compute / candidate.batches.accumulation
    times = {ran.micro_step: ran.times for ran in rehearsal.ran}
    for micro_step in sorted(step for step in times if step):
        busy = {"arithmetic": compute, "inside nodes": 0.0, "between nodes": 0.0}
        for ran in rehearsal.ran:
            if ran.micro_step == micro_step:
                tier = "inside nodes" if ran.collective.nodes == 1 else "between nodes"
                seconds = collective_seconds(ran.collective, hardware, ranks_per_node=rehearsal.topology.ranks_per_node)
                busy[tier] += seconds
        for (name, lane), color in zip(lanes.items(), (GREY, BLUE, ORANGE), strict=True):
            start = at + (busy["inside nodes"] if name == "between nodes" else 0.0)
            axes.barh(lane, busy[name], left=start, color=color, height=0.6)
        last = micro_step + times[micro_step] - 1
        label = f"micro-step {last}" if times[micro_step] == 1 else f"micro-steps {micro_step} to {last}, each"
        axes.annotate(label, (at, 2.45), fontsize=9)
        at += max(busy["arithmetic"], busy["inside nodes"] + busy["between nodes"])
        axes.axvline(at, color="#222", linewidth=0.6)
    axes.set_yticks(list(lanes.values()), list(lanes))
    axes.set_ylim(-0.5, 2.8)
    axes.set_xlim(left=0)
    return figure


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label_sizes(axes: Any, candidates: Sequence[Any], planned: Plan) -> None:
    axes.set_xticks(
        range(len(candidates)), [size_label(candidate, planned).replace(" ", "\n") for candidate in candidates]
    )
    for label, candidate in zip(axes.get_xticklabels(), candidates, strict=True):
        label.set_fontweight("bold" if candidate is planned.chosen else "normal")
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _as_text(table: Any) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(table)
    return f"<pre>{html.escape(console.file.getvalue())}</pre>"  # type: ignore[attr-defined]
