"""Which lines of the package and of FSDP2 each training runs, so that a mutant is looked for where it can act."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch.distributed as dist

from benchmarks.certify.mutants import Mutant
from benchmarks.certify.source import PACKAGE, TORCH

FOLLOWED = (f"{PACKAGE}{os.sep}", f"{TORCH / 'distributed' / 'fsdp'}{os.sep}")
Lines = dict[str, set[int]]  # by file


def follow(folder: Path) -> None:
    """Write each line that this rank runs from now on to a file of its own, once.

    Args:
        folder: Folder of the files.
    """
    output = (folder / f"lines-{dist.get_rank()}").open("w", buffering=1)
    seen: set[tuple[CodeType, int]] = set()
    files: dict[str, str | None] = {}

    def at_line(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line" and (frame.f_code, frame.f_lineno) not in seen:
            seen.add((frame.f_code, frame.f_lineno))
            output.write(f"{frame.f_lineno} {files[frame.f_code.co_filename]}\n")
        return at_line

    def at_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in files:
            real = os.path.realpath(name)
            files[name] = real if real.startswith(FOLLOWED) else None
        return at_line if files[name] is not None else None

    sys.settrace(at_call)


def taken(folder: Path) -> Lines:
    """The lines that all ranks have run, by file; their files are removed.

    Args:
        folder: Folder of the files.
    """
    found: Lines = {}
    for path in folder.glob("lines-*"):
        for text in path.read_text().splitlines():
            line, _, file = text.partition(" ")
            found.setdefault(file, set()).add(int(line))
        path.unlink()
    return found


def reaches(lines: Lines, mutant: Mutant) -> bool:
    """Whether a training runs what a mutant changes; True if that is not known.

    Args:
        lines: Lines of the training.
        mutant: The mutant.
    """
    if mutant.lines is None or not mutant.lines[0].startswith(FOLLOWED):
        return True
    file, first, last = mutant.lines
    return _any_between(lines.get(file, ()), first, last)


def _any_between(lines: Collection[int], first: int, last: int) -> bool:
    return any(first <= line <= last for line in lines)
