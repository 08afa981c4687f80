"""Rewrites a comparison's page and plots from its ``results.json``; nothing is measured again.

python -m benchmarks.comparison.result_page DIR

A file ``remarks.md`` beside it, if there is one, becomes the page's last section.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.comparison.measurements import BASELINE, OURS, Measurements, Setting, Spread, is_ours
from benchmarks.comparison.plots import COLUMNS, draw

PAGE = "README.md"
REMARKS = "remarks.md"
_NONE = "-"

# What the counters of a link have beyond the payload; see benchmarks/README.md.
_HEADERS = "packet headers and acknowledgements included"


def write(folder: Path) -> Path:
    """Write page and plots, and return the page's file."""
    measurements = Measurements.read(folder / "results.json")
    draw(measurements, folder)
    remarks = folder / REMARKS
    sections = [
        _opening(measurements, folder),
        *(_shape(measurements, shape) for shape in measurements.shapes),
        _losses(measurements),
        _accounting(measurements),
        _failures(measurements),
        _conditions(measurements),
        *([remarks.read_text().strip()] if remarks.exists() else []),
    ]
    page = folder / PAGE
    page.write_text("\n\n".join(sections) + "\n")
    return page


def main(arguments: list[str] | None = None) -> None:
    """Write the page of the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.result_page", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where results.json is")
    print(f"wrote {write(parser.parse_args(arguments).folder)}")


def _opening(measurements: Measurements, folder: Path) -> str:
    facts = measurements.facts
    dates = sorted(launch["date"] for launch in measurements.launches)
    commits = sorted({launch["commit"] for launch in measurements.launches})
    machine = facts["machine"]
    processor = machine["processor"]
    return f"""# Step time and bytes between nodes, side by side

**Question.** The same model, weights, data, batch and dtype, on the same links: how long does an optimizer step take
under each system, and how many bytes does each node send?

**Machine.** {processor}, {machine["cores"]} cores, {machine["memory_gib"]} GiB, Linux {machine["kernel"]}. It emulates
every cluster: nodes are network namespaces joined by links, whose rate is held in both directions at once. Real TCP
goes through them ({machine["tcp"]} congestion control, no added delay). All ranks share the cores, with one thread
each; gloo, fp32. Step times compare schedules on slow links; they do not predict a cluster of GPUs.

**Constants.** {_constants(measurements)}

**Runs.** {facts["rounds"]} rounds in turns, each beginning with another system; every launch is a new cluster. A
phase has {facts["steps"]} measured steps, fewer if s > 4, and the first of each rate {facts["warmup_steps"]} of warm-up
before them; a launch may take {facts["launch_minutes"]:g} minutes. Tables give the median (least - greatest).

**Commit.** {", ".join(commits)}; {dates[0]} to {dates[-1]} UTC.

**Commands.** As root, from the root of the repository:

```bash
{facts["command"]}
python -m benchmarks.comparison.result_page {_from_root(folder)}  # this page again, from results.json
```"""


def _from_root(folder: Path) -> str:
    root = Path(__file__).parents[2]
    return str(folder.resolve().relative_to(root)) if folder.resolve().is_relative_to(root) else folder.name


def _constants(measurements: Measurements) -> str:
    facts = measurements.facts
    workload = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["workload"].items())
    return f"Parameters M = {facts['parameter_bytes'] / 1e6:.2f} MB; {workload}; SGD where steps are timed."


def _shape(measurements: Measurements, shape: str) -> str:
    nodes, ranks = shape.split("x")
    rates = [*measurements.facts["rates_mbit"], None]
    return "\n\n".join(
        [
            f"## {nodes} nodes of {ranks} ranks",
            f"![Step time against micro-steps](step-time-{shape}.svg)\n\n"
            f"*Measured, but for the dotted line.* Shape {shape}. {_constants(measurements)}",
            f"![Bytes sent against micro-steps](bytes-{shape}.svg)\n\n"
            f"*Measured, but for the dotted line*, 2M(N-1)/N with N = {nodes} nodes; {_HEADERS}.",
            *(_rate(measurements, shape, rate) for rate in rates),
        ]
    )


def _rate(measurements: Measurements, shape: str, rate: float | None) -> str:
    name = "unshaped links" if rate is None else f"links of {rate:g} Mbit/s"
    settings = [
        Setting(shape=shape, rate_mbit=rate, micro_steps=micro_steps)
        for micro_steps in measurements.facts["micro_steps"]
    ]
    least = measurements.least_bytes(shape)

    def seconds(system: str, setting: Setting) -> str:
        return _cell(measurements.step_seconds(system, setting), measurements.speed_of_ours(system, setting))

    def sent(system: str, setting: Setting) -> str:
        spread = measurements.step_bytes(system, setting)
        if spread is None:
            return _NONE
        ratios = spread.median / least, measurements.bytes_over_ours(system, setting)
        return _cell(spread.times(1e-6), *ratios)

    def left(system: str, setting: Setting) -> str:
        return _number(measurements.left_over(system, setting))

    tables = [
        f"### {shape}, {name}",
        "Seconds per optimizer step on the slowest rank, *measured*: median (least - greatest); then how many times as "
        "long as ours, *computed*.",
        _by_micro_steps(measurements, shape, settings, seconds),
        f"MB (10^6 bytes) sent per node and step, *measured* at the links, {_HEADERS}: median (least - greatest); then "
        f"how many times the least possible, {least / 1e6:.2f} MB, and how many times ours, *computed*.",
        _by_micro_steps(measurements, shape, settings, sent),
    ]
    if rate is not None:
        tables += [
            "Seconds of a step above the larger of its computation (the step on unshaped links) and its transfer (its "
            "bytes at the rate of the link), *computed* from measured medians.",
            _by_micro_steps(measurements, shape, settings, left),
        ]
    return "\n\n".join(tables)


def _by_micro_steps(
    measurements: Measurements, shape: str, settings: Sequence[Setting], cell: Callable[[str, Setting], str]
) -> str:
    rows = [
        [*_place(measurements, system), _named(system), *(cell(system, setting) for setting in settings)]
        for system in measurements.systems(shape)
    ]
    return _table(["reach", "keeps", "system", *(f"s = {setting.micro_steps}" for setting in settings)], rows)


def _place(measurements: Measurements, system: str) -> tuple[str, str]:
    """How far a system reaches and what it keeps, which say what it can be compared with."""
    return COLUMNS[measurements.reach(system)], measurements.keeps(system)


def _losses(measurements: Measurements) -> str:
    purposes = sorted({launch["purpose"] for launch in measurements.launches}, reverse=True)
    columns = [(shape, purpose) for shape in measurements.shapes for purpose in purposes]
    rows = [
        [_named(system), *(_difference(measurements.loss_difference(system, *column)) for column in columns)]
        for system in measurements.systems()
    ]
    compared = max((measurements.losses_compared(*column) for column in columns), default=0)
    return "\n\n".join(
        [
            "## Losses",
            f"Greatest absolute difference of any rank's loss in any step from that of `{BASELINE}` in the same step, "
            f"*computed* from measured losses (up to {compared} per launch). `timing`: all phases and rounds, SGD.",
            _table(["system", *(f"{shape}, {purpose}" for shape, purpose in columns)], rows),
        ]
    )


def _accounting(measurements: Measurements) -> str:
    found = [
        [_named(system), shape, _cell(spread)]
        for system in measurements.systems()
        for shape in measurements.shapes
        if (spread := measurements.accounting(system, shape)) is not None
    ]
    text = "Bytes sent between nodes by the program's own accounting, over those of the link's counter, *measured*."
    return f"## Accounting against counters\n\n{text}\n\n" + (
        _table(["system", "shape", "accounting / counter"], found)
        if found
        else "No system of this comparison accounts."
    )


def _failures(measurements: Measurements) -> str:
    places: dict[tuple[str, str, str], list[str]] = {}  # what failed in the same way is told once
    for launch in measurements.failures:
        place = f"round {launch['round'] + 1}, {launch['shape']}, {launch['purpose']}"
        places.setdefault((launch["system"], launch["reason"], launch["log"]), []).append(place)
    parts = ["## What did not work", *([] if places else ["Every launch ended well."])]
    for (system, reason, log), where in places.items():
        block = f"```text\n{log.replace('```', chr(39) * 3)}\n```"
        parts.append(f"`{system}` failed ({'; '.join(where)}): {reason}.\n\n{block}")
    return "\n\n".join(parts)


def _conditions(measurements: Measurements) -> str:
    rows = [
        [
            _named(system),
            *_place(measurements, system),
            ", ".join(f"{package} {version}" for package, version in measurements.versions(system).items()) or _NONE,
            " ".join(measurements.notes(system)).replace("|", "\\|") or _NONE,
        ]
        for system in measurements.systems()
    ]
    ours = ", ".join(f"`{few}` or `{whole}` ({COLUMNS[reach]})" for reach, (few, whole) in OURS.items())
    return "\n\n".join(
        [
            "## Systems and versions",
            "Reach: how far the model states of one replica are spread. Keeps: what each rank holds from one "
            "micro-step to the next, with M for all parameters, G for all gradients, k ranks of a node. Ours: "
            f"{ours}; the second of each pair for systems that keep all of M and G.",
            _table(["system", "reach", "keeps", "versions", "how it was set"], rows),
        ]
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(spread: Spread | None, *ratios: float | None) -> str:
    if spread is None:
        return _NONE
    figures = f"{_number(spread.median)} ({_number(spread.least)} - {_number(spread.greatest)})"
    return "; ".join([figures, *(f"{ratio:.2f}x" for ratio in ratios if ratio is not None)])


def _number(value: float | None) -> str:
    """Three digits: enough for spreads of a few percent."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _difference(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}"


def _named(system: str) -> str:
    return f"**{system}**" if is_ours(system) else system


if __name__ == "__main__":
    main()
