"""Deaths that a job cannot simply go on after: two nodes at once, a cable that heals, fewer nodes than before.

python -m benchmarks.kill_node.cases --out benchmarks/results/survival/cases

Each case is a job of `benchmarks.kill_node` on four nodes of two ranks, with what happens to it and what has to come of
it. The exit status says whether it came in all cases.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.kill_node.campaign import Job
from benchmarks.kill_node.incidents import Came, fewer, from_disk, healed_late, healed_soon, in_memory, lost, unfit
from benchmarks.kill_node.nodes import preload

STEPS = 16
CABLE_STEPS = 200  # so that the job still runs when the cable is healed


@dataclass(frozen=True)
class Case:
    """A case.

    Attributes:
        name: What happens, in words.
        job: The job.
        run: Function that lets it happen, and returns what came of it in words and whether each part is as required.
    """

    name: str
    job: Job
    run: Callable[[Job, Path], Came]


CASES = (
    *(
        case
        for size, same, apart in ((2, (1, 2), (0, 2)), (4, (1, 3), (1, 2)), (8, (1, 2), (0, 2)))
        for job in (Job(4, 2, size, steps=STEPS),)
        for case in (
            Case(f"nodes {same[0]} and {same[1]}, which hold the same bytes", job, partial(lost, places=same)),
            Case(
                "the same, with a ModelCheckpoint every 3 steps",
                Job(4, 2, size, steps=STEPS, save_every=3),
                partial(from_disk, places=same),
            ),
            Case(f"nodes {apart[0]} and {apart[1]}, which do not", job, partial(in_memory, places=apart)),
        )
    ),
    Case("the cable of node 3, which heals when another node runs", Job(4, 2, 4, steps=CABLE_STEPS), healed_late),
    Case("the cable of node 3, which heals before", Job(4, 2, 4, steps=STEPS), healed_soon),
    Case(
        "node 3, and no other takes its place",
        Job(4, 2, 2, steps=STEPS, least_nodes=3, samples=96, draws=False),
        partial(fewer, places=(3,)),
    ),
    Case(
        "nodes 2 and 3, and no others take their places",
        Job(4, 2, 4, steps=STEPS, least_nodes=2, samples=96, draws=False),
        partial(fewer, places=(2, 3)),
    ),
    Case(
        "node 3, and no other takes its place",
        Job(4, 2, 4, steps=STEPS, least_nodes=3, samples=96, draws=False),
        partial(unfit, places=(3,)),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and write their page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.kill_node.cases", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", type=int, help="numbers of cases, from 1 on; others in the folder stay")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file, right = options.out / "results.json", True
    preload()
    for number in options.only or range(1, len(CASES) + 1):
        found = _found(number, CASES[number - 1])
        right &= all(found["right"].values())
        others = json.loads(file.read_text()) if file.exists() else []
        results = sorted([found, *(other for other in others if other["number"] != number)], key=itemgetter("number"))
        file.write_text(json.dumps(results, indent=1))
        (options.out / "README.md").write_text(_page(options.out, results))
    return 0 if right else 1


def _found(number: int, case: Case) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="kill-node-case-"))  # stays if it fails
    try:
        words, right = case.run(case.job, folder)
    except TimeoutError as error:
        words, right = str(error), {"everything comes in time": False}
    wrong = [claim for claim, holds in right.items() if not holds]
    print(f"{number}. {case.job}, {case.name}: {words}; wrong: {wrong or 'nothing'}", flush=True)
    if wrong:
        print(f"logs are in {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"number": number, "job": str(case.job), "case": case.name, "came": words, "right": right, "date": date}


def _page(out: Path, results: Sequence[dict[str, Any]]) -> str:
    rows = "\n".join(
        f"| {found['job']} | {found['case']} | {found['came']} | {', '.join(found['right'])} "
        f"| {', '.join(claim for claim, holds in found['right'].items() if not holds) or '-'} |"
        for found in results
    )
    good = sum(all(found["right"].values()) for found in results)
    return f"""# Deaths that a job cannot simply go on after

**Question.** What comes of two nodes that die at once, of a cable that heals, and of nodes whose place nobody takes?

**Method.** The job of [the campaign](../README.md) with `in_memory_checkpoint=1`, on nodes that are network namespaces
of one machine, under torchrun with `--max-restarts 1000`. Dead nodes are replaced by empty ones, unless the case says
that nobody takes their place; then launchers have a range of `--nnodes`, 96 samples a step are divided among the ranks,
and nothing random is drawn, so that the mean loss of a step is that of the undisturbed run but for sums in another
order. Nodes are counted as torchrun does.

**Result.** {good} of {len(results)} cases are as required. Measured.

**Date.** {max(found["date"] for found in results)}.

```bash
python -m benchmarks.kill_node.cases --only {" ".join(str(found["number"]) for found in results)} --out {out}
```

| job | what dies | what came | required | not so |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
