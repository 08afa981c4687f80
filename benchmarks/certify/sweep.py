"""No false alarm: ``certify`` over many architectures of ``transformers``, which are right.

The same command continues a sweep: architectures that were certified are not tried again.

python -m benchmarks.certify.sweep --out benchmarks/results/certify/architectures
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.certify.architectures import Made, architectures
from lightning_mics import MiCSStrategy, certify

BATCHES = 8


def certified(make: Callable[[], Made]) -> dict[str, Any]:
    """What ``certify`` says of an architecture, as plain data.

    Args:
        make: Function that returns a model and a batch.
    """
    torch.manual_seed(0)
    batches = [make()[1] for _ in range(BATCHES)]
    began = time.monotonic()
    try:
        report = certify(
            lambda: make()[0], batches, strategy=MiCSStrategy(partition_size=16), shape=(2, 2), accumulate=2
        )
    except (RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300], "seconds": time.monotonic() - began}
    worst = max(report.rows, key=lambda row: row.worst.ratio)
    return {
        "ok": report.ok,
        "float32": any("in float32" in note for note in report.notes),
        "reference": report.reference.partition(",")[0],
        "shrunk": next((note for note in report.notes if note.startswith("shrunk")), ""),
        "what": worst.what,
        "where": worst.worst.where,
        "largest": worst.worst.relative,
        "allowed": worst.worst.allowed,
        "failures": report.failures,
        "reasons": list(report.reasons),
        "seconds": time.monotonic() - began,
    }


def write_page(out: Path, arguments: Sequence[str], found: dict[str, dict[str, Any]]) -> None:
    """Write the page.

    Args:
        out: Folder of the page.
        arguments: Arguments of the command.
        found: What was found, by architecture.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = "\n".join(_row(name, entry) for name, entry in found.items())
    right = sum(entry.get("ok", False) for entry in found.values())
    doubles = sum(entry.get("ok", False) and not entry["float32"] for entry in found.values())
    (out / "README.md").write_text(
        f"""# Architectures that certify leaves in peace

**Question.** Does `certify` call something wrong that is right?

**Method.** Models of 6 layers and width 32, shrunk by `certify` itself, partition groups over two nodes of two ranks
with all traffic between nodes once per step, and the plain schedule; {BATCHES} random batches, two micro-steps.

**Machine.** {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python {platform.python_version()}, torch
{torch.__version__}, gloo.

**Result.** {right} of {len(found)} architectures are certified, {doubles} of them in float64, the others in float32.

**Commit.** {commit}, {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.certify.sweep {" ".join(arguments)}
```

| architecture | certified | in | largest difference, in those allowed | what | seconds |
|---|---|---|--:|---|--:|
{rows}
"""
    )


def _row(name: str, entry: dict[str, Any]) -> str:
    if "error" in entry or entry["failures"]:
        said = entry.get("error") or next(iter(entry["failures"].values()))
        return f"| {name} | no: {said[:120]} | | | | {entry['seconds']:.0f} |"
    if not entry["ok"] and entry.get("reasons"):
        return f"| {name} | rightly not: {entry['reasons'][0].partition(':')[0]} | | | | {entry['seconds']:.0f} |"
    share = entry["largest"] / entry["allowed"] if entry["allowed"] else 0.0
    dtype, verdict = "float32" if entry["float32"] else "float64", "yes" if entry["ok"] else "**no**"
    return f"| {name} | {verdict} | {dtype} | {share:.3f} | {entry['what']} | {entry['seconds']:.0f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Certify the architectures, and write the page; returns 0 if all are certified.

    Args:
        arguments: Arguments of the command; None takes those of the process.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certify.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="take every so many of the architectures (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in list(architectures().items())[:: options.every]:
        found[name] = known[name] if known.get(name, {}).get("ok") else certified(make)
        print(f"{name}: {found[name]}", flush=True)
        file.write_text(json.dumps(known | found, indent=1, default=str))
        write_page(options.out, typed, found)
    return 0 if all(entry.get("ok", False) for entry in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
