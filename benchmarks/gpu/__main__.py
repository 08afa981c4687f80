"""Everything that one GPU can show: ``python -m benchmarks.gpu``; ``--device cpu`` runs it small without one.

Each part runs in a process of its own and ends within nine minutes. What it has found until then is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import page
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.running import run_part


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts and write the page.

    Returns:
        0 if all targets are met, 1 if one is not, 2 without a GPU.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="this part only; several times for several")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes (default: cuda)")
    parser.add_argument("--out", type=Path, help=f"folder of the page (default: {_shown(page.RESULTS)})")
    options = parser.parse_args(typed)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks.gpu: this machine has no GPU that torch can use; --device cpu runs small sizes")
        return 2
    if options.out is None and options.device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            status = _run(options, Path(folder), typed)
            print((Path(folder) / "README.md").read_text())
            return status
    return _run(options, options.out or page.RESULTS, typed)


def _run(options: argparse.Namespace, out: Path, typed: Sequence[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    about = _about(options.device, typed)
    good = True
    for name in options.part or PARTS:
        print(f"-- {name}", flush=True)
        part = {"device": options.device, "about": about, **run_part(name, options.device, out)}
        good &= not part["failed"] and all(entry["holds"] is not False for entry in part["findings"])
        results["parts"][name] = part
        results["parts"] = {known: results["parts"][known] for known in PARTS if known in results["parts"]}
        page.write(results, out)
    return 0 if good else 1


def _about(device: str, typed: Sequence[str]) -> dict[str, str]:
    """What the page says of the machine and the program."""
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name(0) if on_gpu else "CPU",
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else "-",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "-",
        "python": platform.python_version(),
        "commit": _first_line(["git", "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m benchmarks.gpu", *typed]),
    }


def _first_line(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found[0].strip() if found else "unknown"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path(__file__).parents[2]))


if __name__ == "__main__":
    sys.exit(main())
