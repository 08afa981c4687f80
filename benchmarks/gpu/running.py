"""Runs one part in a process of its own, which may die or be ended without losing what it has found."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings, last_line
from benchmarks.gpu.parts import PARTS, SECONDS
from benchmarks.gpu.ranks import context_of


def run_part(name: str, device: str, out: Path) -> dict[str, Any]:
    """Run a part in a process of its own.

    Args:
        name: Name of the part.
        device: ``"cuda"`` or ``"cpu"``.
        out: Folder for its pictures.

    Returns:
        What it found, why it failed, how long it took, and its pictures.
    """
    if device == "cpu":  # forked: what is imported here, no part has to import again
        with suppress(Exception):
            importlib.import_module(PARTS[name].module)
    with tempfile.TemporaryDirectory() as scratch:
        process = context_of(device).Process(target=_part, args=(name, device, scratch))
        begun = time.monotonic()
        process.start()
        process.join(SECONDS)
        seconds, failed = time.monotonic() - begun, ""
        if process.is_alive():
            failed = f"took more than {SECONDS} s"
            os.killpg(process.pid, signal.SIGKILL)  # its ranks as well
            process.join()
        elif process.exitcode:
            failed = f"ended with status {process.exitcode}"
        error = Path(scratch, "failed")
        if error.exists():
            failed = error.read_text()
        findings = Path(scratch, "findings.json")
        pictures = sorted(path.name for path in Path(scratch).glob("*.svg"))
        for picture in pictures:
            shutil.copy(Path(scratch, picture), out / picture)
        return {
            "seconds": round(seconds, 1),
            "failed": failed,
            "findings": json.loads(findings.read_text()) if findings.exists() else [],
            "pictures": pictures,
        }


def _part(name: str, device: str, scratch: str) -> None:
    os.setsid()
    for library in ("GLOO", "NCCL"):  # there may be no network, and no name of this machine that resolves
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    try:
        findings = Findings(Path(scratch, "findings.json"), device=device, out=Path(scratch))
        importlib.import_module(PARTS[name].module).run(findings)
    except BaseException as error:
        traceback.print_exc()
        Path(scratch, "failed").write_text(last_line(error))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and writers may still be alive
