"""What the ranks of a run have written: their losses, and what happened to them when."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Diaries:
    """What the ranks of a run have written.

    Args:
        folder: Folder of the run.
        world_size: Number of ranks.

    Attributes:
        world_size: Number of ranks.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.world_size = world_size
        self._files = [folder / f"rank-{rank}.jsonl" for rank in range(world_size)]
        self._lines: list[list[dict[str, Any]]] = [[] for _ in self._files]
        self._read_bytes = [0] * world_size

    def lines(self) -> list[list[dict[str, Any]]]:
        """The lines of each rank; only new ones are read, as whoever waits asks often."""
        for rank, file in enumerate(self._files):
            with suppress(FileNotFoundError), file.open("rb") as opened:
                opened.seek(self._read_bytes[rank])
                new, end, _ = opened.read().rpartition(b"\n")
                self._read_bytes[rank] += len(new) + len(end)
                self._lines[rank] += [json.loads(line) for line in new.splitlines()]
        return self._lines

    def losses(self) -> dict[tuple[Any, ...], set[str]]:
        """All values of losses and validations, by rank, kind, step and micro-step, also those computed twice."""
        found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for rank, lines in enumerate(self.lines()):
            for line in lines:
                if line["event"] in ("loss", "validation"):
                    found[rank, line["event"], line["step"], line["micro_step"]].add(line["value"])
        return dict(found)

    def differences(self, other: Diaries) -> dict[str, int]:
        """How many losses there are, and how many of them, and of the ranks' digests at the end, another run has not.

        Args:
            other: What the ranks of the same job wrote in another run.
        """
        expected, seen = self.losses(), other.losses()
        different = sum(expected[key] != seen.get(key) for key in expected) + len(seen.keys() - expected)
        ends = sum(not one or one != two for one, two in zip(self.digests(), other.digests(), strict=True))
        return {"losses": len(expected), "different_losses": different, "different_ends": ends}

    def steps_done(self) -> list[int]:
        """Optimizer steps that each rank has done, in all processes."""
        return [max((line["step"] for line in lines if line["event"] == "done"), default=0) for lines in self.lines()]

    def on_all(self, event: str, after: Sequence[float], **facts: Any) -> list[dict[str, Any]] | None:
        """The first line of an event on each rank after its time; None if a rank has none yet.

        Args:
            event: The event.
            after: Times, by rank.
            facts: What the line must have besides.
        """
        found = [first_line(lines, event, since, **facts) for lines, since in zip(self.lines(), after, strict=True)]
        return None if None in found else [line for line in found if line is not None]

    def digests(self) -> list[dict[str, str]]:
        """The digests of each rank at the end."""
        return [next((line["digests"] for line in lines if line["event"] == "end"), {}) for lines in self.lines()]


def first_line(lines: Sequence[dict[str, Any]], event: str, since: float, **facts: Any) -> dict[str, Any] | None:
    """The first line of an event after a time.

    Args:
        lines: Lines of a rank.
        event: The event.
        since: Time, seconds since the epoch.
        facts: What the line must have besides.
    """
    wanted = {"event": event, **facts}
    return next((line for line in lines if line["time"] > since and wanted.items() <= line.items()), None)
