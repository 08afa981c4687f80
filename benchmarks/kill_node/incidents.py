"""What can happen to a job, and what has to come of it: two nodes die at once, a cable heals, nodes are fewer.

Each function returns what came in words, and whether each part of it is as required.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.kill_node.campaign import Campaign, Death, Job, Outcome, Run
from benchmarks.kill_node.diaries import Diaries, first_line

AFTER = 7  # steps that are done before anything happens
END_SECONDS = 10.0  # from the time at which all ranks run again until a job that cannot go on has ended
NAMED_SECONDS = 15.0  # until a node that is cut off is named, and all ranks have ended
CLOSE = 1e-4  # of losses that are summed in another order

Came = tuple[str, dict[str, bool]]


# -- two nodes at once -------------------------------------------------------------------------------------------------


def lost(job: Job, folder: Path, *, places: Sequence[int]) -> Came:
    """Nodes that hold the same bytes die, and there is nothing on a disk.

    Args:
        job: The job.
        folder: Folder for its files.
        places: Nodes that die, by the place of their ranks.
    """
    with _running(job, folder) as run:
        killed = _kill(run, job, places)
        run.replace_dead(killed.nodes)
        return _refused(run, killed.time, "NoWholeStepError", f"node {places[0]}")


def from_disk(job: Job, folder: Path, *, places: Sequence[int]) -> Came:
    """The same, with checkpoints on a disk beside.

    Args:
        job: The job.
        folder: Folder for its files.
        places: Nodes that die, by the place of their ranks.
    """
    words, right = in_memory(job, folder, places=places)
    right["says that steps are lost"] = "steps are lost" in _output(folder / "disturbed", "no step in memory is whole")
    return words, right


def in_memory(job: Job, folder: Path, *, places: Sequence[int]) -> Came:
    """Nodes that do not hold the same bytes die.

    Args:
        job: The job.
        folder: Folder for its files.
        places: Nodes that die, by the place of their ranks.
    """
    calm = _undisturbed(job, folder)
    with _running(job, folder) as run:
        killed = _kill(run, job, places)
        run.replace_dead(killed.nodes)
        outcome = killed.outcome
        run.wait_for_recovery(outcome, killed.time)
        return _went_on(run, outcome, calm, run.finish())


# -- a cable that heals ------------------------------------------------------------------------------------------------


def healed_late(job: Job, folder: Path) -> Came:
    """A node is cut off, another one takes its place, and then the cable heals."""
    calm = _undisturbed(job, folder)
    with _running(job, folder) as run:
        cut = _cut(run, job)
        run.launch(run.standby)
        right = _noticed(run, cut)
        outcome = cut.outcome
        run.wait_for_recovery(outcome, cut.time)
        (node,) = cut.nodes
        right["the keeper of the old node waits"] = len(run.nodes.keepers(node)) == 1
        run.network.heal(node)
        healed = time.time()
        run.wait(lambda: not run.nodes.keepers(node), "the end of the keeper of the old node")
        ended = time.time() - healed
        right["the job still runs then"] = max(run.diaries.steps_done()) < job.steps
        statuses = run.finish(besides=[node])
        run.nodes.kill(node)
        words, more = _went_on(run, outcome, calm, statuses)
        starts = [line for lines in run.diaries.lines() for line in lines if line["event"] == "start"]
        here = [line for line in starts if line["node"] == f"node{node}" and line["time"] > cut.time]
        right["no rank of the old node starts"] = not here
        return f"{words}; the old node's keeper ended {ended:.1f} s after the cable healed", right | more


def healed_soon(job: Job, folder: Path) -> Came:
    """A node is cut off, and the cable heals before another one takes its place."""
    calm = _undisturbed(job, folder)
    with _running(job, folder) as run:
        cut = _cut(run, job)
        right = _noticed(run, cut)
        run.network.heal(cut.nodes[0])
        run.wait_for_recovery(cut.outcome, cut.time)
        words, more = _went_on(run, cut.outcome, calm, run.finish())
        right["the old node takes part again"] = run.node_of(_last(job)) in range(job.nodes)
        return words, right | more


# -- fewer nodes -------------------------------------------------------------------------------------------------------


def fewer(job: Job, folder: Path, *, places: Sequence[int]) -> Came:
    """Nodes die and no other takes their place, but the partition size fits those that are left.

    Args:
        job: The job.
        folder: Folder for its files.
        places: Nodes that die, by the place of their ranks.
    """
    calm = _undisturbed(job, folder)
    with _running(job, folder) as run:
        before = run.diaries
        killed = _kill(run, job, places)
        left = job.world_size - job.ranks_per_node * len(places)
        run.diaries = Diaries(run.folder, left)
        outcome = killed.outcome
        run.wait_for_recovery(outcome, killed.time, saves_again=False)
        statuses = run.finish()
        expected = _means(calm, calm, job, 0)
        seen = _means(before, run.diaries, job, outcome.resumed)
        gap = max((abs(seen.get(step, 0.0) / loss - 1) for step, loss in expected.items()), default=1.0)
        said = f"the job goes on with {left} ranks after {job.world_size}"
        return (
            f"went on from step {outcome.resumed} of {outcome.done} with {left} ranks after "
            f"{outcome.seconds['step']:.1f} s; mean losses of steps differ by {gap:.0e} at most",
            {
                "no more than one step is lost": outcome.ok,
                "it ends with status 0": _ended_well(statuses, left // job.ranks_per_node),
                "losses are those of all ranks, but for sums in another order": gap < CLOSE,
                "says that bits are other ones": "not with the same bits" in _output(run.folder, said),
            },
        )


def unfit(job: Job, folder: Path, *, places: Sequence[int]) -> Came:
    """Nodes die and no other takes their place, and the partition size does not fit those that are left.

    Args:
        job: The job.
        folder: Folder for its files.
        places: Nodes that die, by the place of their ranks.
    """
    with _running(job, folder) as run:
        killed = _kill(run, job, places)
        run.diaries = Diaries(run.folder, job.world_size - job.ranks_per_node * len(places))
        return _refused(run, killed.time, "UnfitRanksError", "start spare nodes")


# -- what cases share --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Happened:
    time: float  # seconds since the epoch
    nodes: list[int]
    outcome: Outcome
    ranks: list[int]  # processes


@contextmanager
def _running(job: Job, folder: Path) -> Iterator[Run]:
    with Campaign(job, folder).running("disturbed") as run:
        run.wait_for_step(AFTER)
        yield run


def _undisturbed(job: Job, folder: Path) -> Diaries:
    with Campaign(job, folder).running("undisturbed") as run:
        run.finish()
        return run.diaries


def _happens(run: Run, job: Job, places: Sequence[int], act: Callable[[int], None], what: str) -> _Happened:
    nodes = [run.node_of(place * job.ranks_per_node) for place in places]
    ranks = [run.place(rank)["process"] for rank in range(job.world_size)]
    began = time.time()
    for node in nodes:
        act(node)
    death = Death("any", what, places[0] * job.ranks_per_node)
    return _Happened(began, nodes, Outcome.of(death, run.diaries, most_lost=job.most_lost), ranks)


def _kill(run: Run, job: Job, places: Sequence[int]) -> _Happened:
    return _happens(run, job, places, run.nodes.kill, "node")


def _cut(run: Run, job: Job) -> _Happened:
    return _happens(run, job, [job.nodes - 1], run.network.cut, "cable")


def _last(job: Job) -> int:
    return job.world_size - 1


def _noticed(run: Run, cut: _Happened) -> dict[str, bool]:
    """Whether the node is named in the others' output, and all ranks end, soon after it is cut off."""
    (node,) = cut.nodes
    words = f"the node of {run.network.address(node)}:"
    others = [run.folder / f"node{other}.log" for other in range(run.nodes.head) if other != node]

    def is_named() -> bool:
        return any(words in log.read_text(errors="replace") for log in others if log.exists())

    run.wait(is_named, "the name of the node that is cut off")
    seconds = [time.time() - cut.time]
    run.wait(lambda: not any(Path(f"/proc/{process}").exists() for process in cut.ranks), "the end of the ranks")
    seconds.append(time.time() - cut.time)
    print(f"named after {seconds[0]:.1f} s, all ranks have ended after {seconds[1]:.1f} s", flush=True)
    return {
        f"named within {NAMED_SECONDS:g} s ({seconds[0]:.1f})": seconds[0] <= NAMED_SECONDS,
        f"all ranks end within {NAMED_SECONDS:g} s ({seconds[1]:.1f})": seconds[1] <= NAMED_SECONDS,
    }


def _went_on(run: Run, outcome: Outcome, calm: Diaries, statuses: dict[int, int]) -> Came:
    differences, where = calm.differences(run.diaries), "a disk" if run.job.save_every else "memory"
    return (
        f"went on from step {outcome.resumed} of {outcome.done}, from {where}, after {outcome.seconds['step']:.1f} s; "
        f"{differences['different_losses']} of {differences['losses']} losses differ, "
        f"{differences['different_ends']} ranks at the end",
        {
            f"no more steps are lost than {outcome.most_lost}": outcome.ok,
            "the same bits": not differences["different_losses"] and not differences["different_ends"],
            "it ends with status 0": _ended_well(statuses, run.job.nodes),
            "no keeper is left": not run.keepers(),
        },
    )


def _ended_well(statuses: dict[int, int], nodes: int) -> bool:
    return len(statuses) == nodes and not any(statuses.values())


def _refused(run: Run, killed: float, kind: str, names: str) -> Came:
    """Whether the job has ended as one does that cannot go on."""
    run.wait(partial(run.diaries.on_all, "start", run.diaries.world_size * [killed]), "another start")
    statuses = run.finish()
    ended = time.time()
    lines = run.diaries.lines()
    started = [[line["time"] for line in of if line["event"] == "start" and line["time"] > killed] for of in lines]
    noticed = [first_line(of, "noticed", times[-1]) for of, times in zip(lines, started, strict=True)]
    errors = {"nothing" if line is None else str(line["error"]) for line in noticed}
    seconds = ended - max(times[-1] for times in started)
    return (
        f"ended {seconds:.1f} s after all ranks ran again: `{sorted(errors)[0]}`",
        {
            "one error on all ranks": len(errors) == 1 and all(error.startswith(kind) for error in errors),
            f"it names {names}": all(names in error for error in errors),
            f"within {END_SECONDS:g} s": seconds <= END_SECONDS,
            "no launcher ends with status 0": bool(statuses) and all(statuses.values()),
            "ranks start once": all(len(times) == 1 for times in started),
            "never anew": not any(first_line(of, "loss", times[-1]) for of, times in zip(lines, started, strict=True)),
        },
    )


def _output(folder: Path, wanted: str) -> str:
    """The line of the nodes' output in which something stands, with what follows it."""
    logs = [log.read_text(errors="replace") for log in sorted(folder.glob("node*.log"))]
    return next((log[log.index(wanted) :][:500] for log in logs if wanted in log), "")


def _means(before: Diaries, after: Diaries, job: Job, resumed: int) -> dict[int, float]:
    """The mean loss of each step, of ranks before and after a death.

    Args:
        before: Diaries of all ranks.
        after: Diaries of the ranks that are left.
        job: The job.
        resumed: Step that the ranks that are left resumed from.
    """
    sums: dict[int, list[float]] = {}
    for step in range(job.steps):
        lines = (before if step < resumed else after).lines()
        values = [
            {line["micro_step"]: line["value"] for line in of if line["event"] == "loss" and line["step"] == step}
            for of in lines
        ]
        sums[step] = [float.fromhex(value) for of in values for value in of.values()]
    return {step: sum(values) / len(values) for step, values in sums.items() if values}
