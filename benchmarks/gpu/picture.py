"""A trace of torch.profiler as a picture: one lane per stream of the device, with the host's ranges above."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LANE, LEFT, TOP = 1200, 26, 190, 40
COLORS = {"gather": "#4c78a8", "reduce": "#f58518", "gemm": "#54a24b", "flash": "#72b7b2", "mem": "#bab0ac"}
OTHER = "#9d755d"
MOST = 6000  # rectangles


def events_of(profiler: Any) -> list[dict[str, Any]]:
    """The complete events of a profile, as Chrome's trace format has them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    return [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]


def draw(events: Sequence[dict[str, Any]], file: Path, *, title: str) -> int:
    """Draw kernels by stream and the host's ``MiCS::`` ranges; returns the number of rectangles."""
    drawn = [(lane, event) for event in events if (lane := _lane(event)) is not None]
    if not drawn:
        raise RuntimeError("the trace has neither kernels nor ranges of this package")
    drawn = sorted(drawn, key=lambda pair: -float(pair[1]["dur"]))[:MOST]
    lanes = sorted({lane for lane, _ in drawn})
    begin = min(float(event["ts"]) for _, event in drawn)
    end = max(float(event["ts"]) + float(event["dur"]) for _, event in drawn)
    scale = (WIDTH - LEFT - 10) / max(end - begin, 1e-9)
    height = TOP + LANE * len(lanes) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="22" font-size="14">{escape(title)}: {(end - begin) / 1e3:.1f} ms</text>'
    ]
    for index, lane in enumerate(lanes):
        parts.append(f'<text x="10" y="{TOP + LANE * index + 16}">{escape(lane)}</text>')
    for lane, event in drawn:
        x, y = LEFT + (float(event["ts"]) - begin) * scale, TOP + LANE * lanes.index(lane)
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(0.3, float(event["dur"]) * scale):.1f}" height="{LANE - 6}" '
            f'fill="{_color(event["name"])}"><title>{escape(event["name"][:100])}</title></rect>'
        )
    x = LEFT
    for name, color in [*COLORS.items(), ("other", OTHER)]:
        parts.append(f'<rect x="{x}" y="{height - 22}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 16}" y="{height - 12}">{name}</text>')
        x += 90
    file.write_text("\n".join([*parts, "</svg>\n"]))
    return len(drawn)


def _lane(event: dict[str, Any]) -> str | None:
    if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
        return f"stream {event.get('args', {}).get('stream', '?')}"
    if event.get("cat") == "user_annotation" and event["name"].startswith("MiCS::"):
        return "host, ranges"
    return None


def _color(name: str) -> str:
    lowered = name.lower()
    return next((color for word, color in COLORS.items() if word in lowered), OTHER)
