"""Trains every mutant until a comparison shows it: under each set of options, in each training, in turn."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.certify.model import CASES, Case
from benchmarks.certify.mutants import Mutant, Mutated, chosen
from benchmarks.certify.operators import operator_mutants
from benchmarks.certify.reached import Lines, follow, reaches, taken
from benchmarks.certify.source import FILES, functions, places, source_mutant
from benchmarks.certify.trials import RESUMES, Trials
from lightning_mics.certification import ranks as forked
from lightning_mics.certification.recorder import Seen

SECONDS = 40.0  # of a training, after which its ranks are killed
GRACE = 2.0  # seconds for other ranks after one has failed
OF_SOURCE = 0.08  # share of the mutants that change source code
Entry = dict[str, Any]


class Campaign:
    """Mutants, and the trainings that they are looked for in.

    Args:
        folder: Folder for files of the trainings.
        cases: Sets of options.
    """

    def __init__(self, folder: Path, *, cases: Sequence[Case] = CASES) -> None:
        forked.GRACE = GRACE
        self._folder = folder
        self._trials = [
            Trials(case, folder / f"case-{number}", kind=Mutated, seconds=SECONDS) for number, case in enumerate(cases)
        ]
        self._lines: list[dict[str, Lines]] = []  # of each case, by training
        self.clean: list[Entry] = []

    def train_without_mutants(self, *, follows: bool = True) -> None:
        """Train the references, and all trainings as they are; what these show is in ``clean``.

        Args:
            follows: Whether lines are noted; else every training is one that every mutant may act in.
        """
        functions()  # before any rank is forked
        for number, trials in enumerate(self._trials):
            folder = self._folder / f"marks-{number}"
            folder.mkdir(exist_ok=True)
            reference = trials.train_reference()
            chosen.apply = partial(follow, folder) if follows else None
            lines: dict[str, Lines] = {}
            verdicts = trials.train_all(partial(_next_training, folder, lines))
            _next_training(folder, lines, "")
            chosen.apply = None
            self._lines.append(lines if follows else {})
            for training, verdict in verdicts.items():
                found = {"by": verdict.by, "where": verdict.where, "seconds": round(verdict.seconds, 2)}
                self.clean.append({"case": str(trials.case), "reference": reference, "training": training, **found})

    def drawn(self, count: int, seed: int) -> list[Mutant]:
        """Mutants of all kinds in turn, from source code and from operators; some more than ``count``.

        Args:
            count: Number of mutants that are to act.
            seed: Seed of the draw.
        """
        more = count + count // 3
        of_source = round(more * OF_SOURCE)
        found = _from_all_kinds(self._reached(operator_mutants()), more - of_source, seed)
        made: dict[str, list[Any]] = defaultdict(list)
        for place in (place for file in FILES for place in places(str(file.resolve()))):
            if any(place.line in lines.get(place.file, ()) for case in self._lines for lines in case.values()):
                made[place.operator].append(place)
        orders = [sorted(each, key=lambda place: _place_in_draw(place.name, seed)) for _, each in sorted(made.items())]
        mutants = filter(None, map(source_mutant, _in_turn(orders)))
        found += [mutant for mutant, _ in zip(mutants, range(of_source), strict=False)]
        random.Random(seed).shuffle(found)
        return found

    def find(self, mutant: Mutant, number: int, place: Path) -> Entry:
        """Train a mutant until it is found.

        Args:
            mutant: The mutant.
            number: Number of the mutant, which decides what set of options is first.
            place: Folder for its checkpoints.
        """
        began, trained, acted = time.monotonic(), 0, mutant.kind.startswith("source")
        place.mkdir(parents=True, exist_ok=True)
        chosen.marks = place / "marks"
        chosen.marks.mkdir(exist_ok=True)
        chosen.take_marks()
        chosen.apply = mutant.apply
        entry: Entry = {"name": mutant.name, "kind": mutant.kind, "place": mutant.place}
        saved: dict[int, dict[str, tuple[Path, list[Seen]]]] = defaultdict(dict)  # of each case
        for index, training in self._trainings(mutant, number):
            trials = self._trials[index]
            verdict = trials.train(training, saved[index], place=place)
            trained += 1
            marks = chosen.take_marks()
            if "not-applied" in marks:
                entry |= {"by": None, "not applied": marks["not-applied"]}
                break
            acted = acted or "acted" in marks
            if verdict.by is not None:
                entry |= {"case": str(trials.case), "training": training, "by": verdict.by, "where": verdict.where}
                entry |= {"relative": verdict.relative}
                break
        chosen.apply = None
        return {"by": None, **entry, "acted": acted, "trained": trained, "seconds": round(time.monotonic() - began, 2)}

    def find_all(
        self, mutants: Iterable[tuple[int, Mutant]], *, workers: int, stop: multiprocessing.synchronize.Event
    ) -> Iterator[tuple[int, Entry]]:
        """Train mutants, some at a time; yields the number of each with what was found, as they end.

        Args:
            mutants: Mutants with their numbers.
            workers: Number of mutants at a time.
            stop: Set by the caller to begin no more.
        """
        context = multiprocessing.get_context("fork")
        waiting = list(mutants)
        next_one = context.Value("i", 0)
        results: Any = context.SimpleQueue()

        def work(worker: int) -> None:
            while not stop.is_set():
                with next_one.get_lock():
                    mine, next_one.value = next_one.value, next_one.value + 1
                if mine >= len(waiting):
                    break
                number, mutant = waiting[mine]
                results.put((number, self.find(mutant, number, self._folder / f"worker-{worker}")))
            results.put(None)

        processes = [context.Process(target=work, args=(worker,)) for worker in range(workers)]
        for process in processes:
            process.start()
        ended = 0
        try:
            while ended < workers:
                result = results.get()
                if result is None:
                    ended += 1
                else:
                    yield result
        finally:
            stop.set()
            for process in processes:
                process.join()

    def _reached(self, mutants: Iterable[Mutant]) -> list[Mutant]:
        every = [lines for case in self._lines for lines in case.values()]
        return [mutant for mutant in mutants if not every or any(reaches(lines, mutant) for lines in every)]

    def _trainings(self, mutant: Mutant, number: int) -> Iterator[tuple[int, str]]:
        """Cases, and trainings in each, that a mutant can show itself in, in the order in which they are tried."""
        for turn in range(len(self._trials)):
            index = (number + turn) % len(self._trials)
            lines = self._lines[index]
            acting = {name for name in self._trials[index].case.trainings if reaches_in(lines, name, mutant)}
            for name in self._trials[index].case.trainings:
                if name in acting or RESUMES.get(name) in acting:
                    yield index, name


def reaches_in(lines: dict[str, Lines], training: str, mutant: Mutant) -> bool:
    """Whether a training runs what a mutant changes.

    Args:
        lines: Lines of all trainings of a case; empty if they were not noted.
        training: Name of the training.
        mutant: The mutant.
    """
    return not lines or reaches(lines[training], mutant)


def _next_training(folder: Path, lines: dict[str, Lines], name: str) -> None:
    """Give the lines of the training that has ended to its name, and begin the next one."""
    if lines:
        lines[next(reversed(lines))] = taken(folder)
    if name:
        lines[name] = {}


def _from_all_kinds(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        kinds[mutant.kind].append(mutant)
    return [mutant for mutant, _ in zip(_in_turn(_shuffled(kinds, seed)), range(count), strict=False)]


def _shuffled(kinds: dict[str, list[Any]], seed: int) -> list[list[Any]]:
    """The entries of each kind in an order of its own, which does not depend on other kinds."""
    return [random.Random(f"{seed} {kind}").sample(each, len(each)) for kind, each in sorted(kinds.items())]


def _place_in_draw(name: str, seed: int) -> str:
    """Key by which places are drawn: places that come or go do not change the order of the others."""
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def _in_turn(lists: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """One of each list, and again, until all are empty."""
    waiting = [iter(each) for each in lists]
    while waiting:
        for each in list(waiting):
            with suppress(StopIteration):
                yield next(each)
                continue
            waiting.remove(each)
