"""The trainings of one case, each compared with a reference that is trained once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.certify.model import MICRO_STEPS, RANKS, Case, batches
from lightning_mics import MiCSStrategy
from lightning_mics.certification.bench import Bench, with_ranks
from lightning_mics.certification.modules import Preparation
from lightning_mics.certification.recorder import Seen
from lightning_mics.certification.rows import Row
from lightning_mics.certification.scaling import scaled_jobs

RESUMES = {"resumed": "job", "on 2 ranks": "job", "full": "control"}  # whose checkpoint each training resumes


@dataclass(frozen=True)
class Verdict:
    """What a training has shown.

    Attributes:
        by: Comparison that was wrong first, ``"error"`` if the training ended in one, ``"no answer"`` if ranks were
            killed; None if nothing was wrong.
        where: Tensor and moment of the difference, or the error.
        relative: Largest difference of that comparison, as a number; None for an error.
        seconds: Duration.
    """

    by: str | None
    where: str
    relative: float | None
    seconds: float


class Trials(Bench):
    """Trains a case again and again, with one reference.

    Args:
        case: The case.
        folder: Folder for files.
        kind: Class of the strategy.
        seconds: Longest duration of a training.
    """

    def __init__(self, case: Case, folder: Path, *, kind: type[MiCSStrategy], seconds: float) -> None:
        options = MiCSStrategy(ranks_per_node=2, **case.options)._policy.given
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(
            scaled_jobs(options, job_shape=(2, 2), shape=(2, 2)),
            Preparation(case.module, shrink=False, blocks=2),
            batches(),
            folder,
            make_strategy=kind,
            accumulate=MICRO_STEPS,
            clip_algorithm="norm",
            seconds=seconds,
        )
        self.case = case
        self._saved: dict[str, tuple[Path, list[Seen]]] = {}  # without a mutant

    def train_reference(self) -> str:
        """Train the reference; returns what it is, in words."""
        return self._run_reference(automatic=self._prepare())

    def train_all(self, before: Callable[[str], None]) -> dict[str, Verdict]:
        """Run all trainings, whose checkpoints :meth:`train` then uses.

        Args:
            before: Called with the name of each training before it.
        """
        saved: dict[str, tuple[Path, list[Seen]]] = {}
        verdicts = {}
        for name in self.case.trainings:
            before(name)
            verdicts[name] = self.train(name, saved, place=self._folder)
        self._saved = saved
        return verdicts

    def train(self, name: str, saved: dict[str, tuple[Path, list[Seen]]], *, place: Path) -> Verdict:
        """Run one training and compare it.

        Args:
            name: Name of the training.
            saved: Checkpoints of this mutant's trainings by their name, with what ranks had seen; added to.
            place: Folder of these checkpoints.
        """
        began = time.monotonic()
        self._rows, self._failures = [], {}
        job, control = self._jobs
        if name in RESUMES:
            path, seen = saved.get(RESUMES[name]) or self._saved[RESUMES[name]]
            resuming = with_ranks(job, RANKS // 2) if name == "on 2 ranks" else job
            self._resume(name, resuming, path, seen)
        else:
            path = place / f"{name}.ckpt"
            _remove(path)
            kind: dict[str, Any] = {"state_dict_type": "full"} if name == "control" else {}
            found = self._run(name, control if name == "control" else job, save=path, **kind)
            if found is not None:
                saved[name] = (path, found)
        return self._verdict(time.monotonic() - began)

    def _verdict(self, seconds: float) -> Verdict:
        for error in self._failures.values():
            silent = error.startswith("no answer within")
            return Verdict("no answer" if silent else "error", error.partition("\n")[0][:300], None, seconds)
        wrong = [row for row in self._rows if row.first is not None]
        if not wrong:
            return Verdict(None, "", None, seconds)
        earliest = min(wrong, key=_when)
        assert earliest.first is not None
        where = f"{earliest.first.where}, {earliest.first.moment}"
        return Verdict(earliest.what, where, earliest.worst.relative, seconds)


def _when(row: Row) -> tuple[int, int]:
    """The optimizer step of the first difference, and the place of the comparison in a step."""
    assert row.first is not None
    order = ("losses", "evaluation", "gradients", "clipped gradients", "weights", "optimizer states", "buffers")
    place = order.index(row.what) if row.what in order else len(order)
    return (row.first.steps - (place > order.index("clipped gradients")), place)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
