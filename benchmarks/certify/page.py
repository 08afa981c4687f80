"""The page of results of a campaign."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.certify.campaign import SECONDS, Entry
from benchmarks.certify.equivalent import argument
from benchmarks.certify.model import CASES, MICRO_STEPS, RANKS, WINDOWS


def write_page(out: Path, arguments: Sequence[str], results: dict[str, Any]) -> None:
    """Write the page.

    Args:
        out: Folder of the page.
        arguments: Arguments of the command.
        results: Mutants and trainings without one, as in ``results.json``.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made = [entry for entry in results["mutants"].values() if entry["acted"]]
    found = [entry for entry in made if entry["by"] is not None]
    equal = [entry for entry in made if entry["by"] is None and argument(entry["name"])]
    missed = [entry for entry in made if entry["by"] is None and not argument(entry["name"])]
    clean = results["clean"]
    alarms = [entry for entry in clean if entry["by"] is not None]
    first = sum(entry["trained"] == 1 for entry in found)
    by_error = sum(entry["by"] == "error" for entry in found)
    cases = "\n".join(f"- {case}: `{dict(case.options)}`, {', '.join(case.trainings)}" for case in CASES)
    (out / "README.md").write_text(
        f"""# Faults that certify finds

**Question.** Which faults in this package, and in FSDP2 below it, does `certify` find?

**Method.** Each mutant is one fault, made in the forked ranks of the trainings and not in the reference. Operators make
them at every parameter group, step and rank; operators over source code change one node of a function that the
trainings run. They are drawn by a seed, all kinds in turn. A mutant is trained under one set of options after the
other, from a set that changes with each, until a comparison shows it. One that never acts is no fault and not counted.

**Constants.** {RANKS} ranks as two nodes of two, {WINDOWS} windows of {MICRO_STEPS} micro-steps, float64, the
tolerances of `certify`; at most {SECONDS:g} s for a training. Trainings under each set of options:

{cases}

**Machine.** {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python {platform.python_version()}, torch
{torch.__version__}, gloo.

**Result.** {len(made)} faults of {len({entry["kind"] for entry in made})} kinds: {len(found)} found, {first} of them
by the first training, {by_error} by an error that ended it; {len(equal)} equivalent, as argued below; {len(missed)}
missed. Without a fault {len(clean) - len(alarms)} of {len(clean)} trainings agree. {_seconds(made)}

**Commit.** {commit}, {time.strftime("%Y-%m-%d", time.gmtime())}.

```bash
python -m benchmarks.certify {" ".join(arguments)}
```

| kind of fault | faults | found | equivalent | missed | by | seconds: median (most) |
|---|--:|--:|--:|--:|---|--:|
{_table(made)}

By "error": the training ended in an error of the package, of torch or of Lightning; by "no answer": ranks waited for
each other. Other names are those of the comparisons in a report of `certify`.

**What the draw leaves out.** Of source code: streams, counters, messages, checks, memory, and what decides only when
something is gathered. This list and the share of source mutants were set after first draws, in which about a third of
the source mutants changed no number. Some operators were rewritten after they had proved to change nothing.

## Missed

{_list(missed)}

## Equivalent

{_list(equal)}
"""
    )


def _seconds(made: Sequence[Entry]) -> str:
    return f"The trainings took {sum(entry['seconds'] for entry in made) / 60:.0f} minutes, two faults at a time."


def _table(made: Sequence[Entry]) -> str:
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in made:
        kinds[entry["kind"]].append(entry)
    return "\n".join(_row(kind, of_kind) for kind, of_kind in sorted(kinds.items()))


def _row(kind: str, entries: Sequence[Entry]) -> str:
    by = Counter(entry["by"] for entry in entries if entry["by"] is not None)
    equal = sum(entry["by"] is None and bool(argument(entry["name"])) for entry in entries)
    seconds = [entry["seconds"] for entry in entries]
    words = ", ".join(f"{what} {number}" for what, number in by.most_common())
    return (
        f"| {kind} | {len(entries)} | {by.total()} | {equal} | {len(entries) - by.total() - equal} | {words} "
        f"| {statistics.median(seconds):.1f} ({max(seconds):.1f}) |"
    )


def _list(entries: Sequence[Entry]) -> str:
    lines = [
        f"- `{entry['name']}` ({entry['kind']})" + (f": {why}" if (why := argument(entry["name"])) else "")
        for entry in entries
    ]
    return "\n".join(lines) or "None."
