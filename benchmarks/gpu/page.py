"""The page of what was seen on a GPU, and the line about it in the project's README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


def write(results: dict[str, Any], out: Path) -> None:
    """Write ``results.json`` and the page."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "README.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """The page as text."""
    lines = ["# What was seen on one device", "", status_line(results), ""]
    for name, part in results["parts"].items():
        about = part["about"]
        lines += [f"## {PARTS[name].title}", ""]
        lines.append(
            f"{about['device']}, driver {about['driver']}; torch {about['torch']}, CUDA {about['cuda']}, NCCL "
            f"{about['nccl']}, Python {about['python']}; commit {about['commit']}, {about['date']}; "
            f"{part['seconds']:.0f} s. `{about['command']}`"
        )
        lines.append("")
        if part["failed"]:
            lines += [f"**Failed**: {_cell(part['failed'])}", ""]
        if part["findings"]:
            lines += ["| what | seen | target | met |", "|---|---|---|---|"]
        for entry in part["findings"]:
            met = {None: "", True: "yes", False: "**no**"}[entry["holds"]]
            lines.append(f"| {_cell(entry['what'])} | {_cell(entry['seen'])} | {_cell(entry['target'])} | {met} |")
        pictures = [f"![{name}: a trace]({picture})" for picture in part["pictures"]]
        lines += ["", *pictures, ""] if pictures else [""]
    return "\n".join(lines).rstrip() + "\n"


def status_line(results: dict[str, Any] | None) -> str:
    """What has been seen on which GPU, in one line.

    Args:
        results: Contents of ``results.json``; None if there are none.
    """
    on_gpu = {} if results is None else {n: p for n, p in results["parts"].items() if p["device"] == "cuda"}
    if not on_gpu:
        return "Status on GPUs: not run on a GPU. `make gpu` shows on one GPU what one can show."
    seen = []
    for name, part in on_gpu.items():
        judged = [entry["holds"] for entry in part["findings"] if entry["holds"] is not None]
        failed = ", then failed" if part["failed"] else ""
        seen.append(f"{PARTS[name].title.lower()} {sum(judged)} of {len(judged)} targets met{failed}")
    about = list(on_gpu.values())[-1]["about"]
    return (
        f"Status on GPUs: on one {about['device']} with torch {about['torch']}: {'; '.join(seen)}. On several GPUs: "
        "not run."
    )


def status() -> str:
    """The line that the project's README has: that of the committed page."""
    file = RESULTS / "results.json"
    return status_line(json.loads(file.read_text()) if file.exists() else None)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
