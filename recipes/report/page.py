"""The results of a run, on one self-contained page."""

from __future__ import annotations

import base64
import html
import io
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers

from recipes.report.curves import PANELS, References, Series, draw

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}td:first-child{color:#666}"
    "pre{background:#f5f5f5;padding:.8rem;overflow-x:auto;font-size:13px}img{max-width:100%}"
)


def write_report(
    path: Path,
    *,
    title: str,
    command: Sequence[str],
    facts: Mapping[str, str],
    results: Mapping[str, str],
    tables: Sequence[str],
    series: Series,
    references: References,
    sample: str,
) -> None:
    """Write the page.

    Args:
        path: Path of the HTML file.
        title: Heading of the page.
        command: Command line, in words.
        facts: Facts on model, data and machine.
        results: Results and their baselines.
        tables: Tables that are printed at start.
        series: Measured series, over steps.
        references: Baselines of series; see :func:`~recipes.report.curves.draw`.
        sample: Text that the model has generated.
    """
    versions = {
        "lightning_mics": metadata.version("lightning_mics"),
        "lightning": lightning.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(shlex.join(command))}</pre>",
        "<h2>Results</h2>",
        _table(results),
        picture(draw(series, PANELS, references=references), alt="what was measured, by optimizer step"),
        "<h2>Sample</h2>",
        f"<pre>{html.escape(sample)}</pre>",
        "<h2>Run</h2>",
        _table({**facts, "versions": ", ".join(f"{name} {version}" for name, version in versions.items())}),
        *(f"<pre>{html.escape(table)}</pre>" for table in tables),
    ]
    write_page(path, title=title, body=body)


def write_page(path: Path, *, title: str, body: Sequence[str]) -> None:
    """Write an HTML file of the parts in ``body`` that needs no other file."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"{head}<style>{STYLE}</style>", *body, "</html>"]), encoding="utf-8")


def picture(figure: Any, *, alt: str) -> str:
    """A matplotlib figure as an HTML image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"
