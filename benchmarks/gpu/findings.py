"""What a part has seen, written to a file after each finding: what there is stays if the part dies."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Findings:
    """The findings of one part.

    Args:
        file: File that they are written to.
        device: ``"cuda"`` or ``"cpu"``.
        out: Folder for pictures.
    """

    def __init__(self, file: Path, *, device: str, out: Path) -> None:
        self.device = device
        self.out = out
        self._file = file
        self._entries: list[dict[str, Any]] = []

    def add(self, what: str, seen: float | str, *, target: str = "", holds: bool | None = None) -> None:
        """Record a finding.

        Args:
            what: What was looked at.
            seen: What came out.
            target: What should come out; empty for none.
            holds: Whether it did; None where there is no target.
        """
        self._entries.append({"what": what, "seen": seen, "target": target, "holds": holds})
        self._file.write_text(json.dumps(self._entries, indent=1))
        print(f"{what}: {seen}" + ("" if holds is None else f" ({target}: {'yes' if holds else 'NO'})"), flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error inside as a finding that does not hold, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(what, last_line(error), target="no error", holds=False)


def last_line(error: BaseException) -> str:
    """The last line of a traceback, with the innermost place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}{place}"
