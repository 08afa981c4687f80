"""Compares the moments of a training with those of the reference, tensor by tensor, as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_mics.certification.differences import Difference, Most, difference, factor, scales
from lightning_mics.certification.recorder import SAVED, Seen
from lightning_mics.certification.rows import Row
from lightning_mics.topology import Topology

SCALED_AS = {
    "weights": "weights",
    "buffers": "weights",
    "gradients": "gradients",
    "clipped gradients": "gradients",
    "optimizer states": "states",
}


class Reference:
    """The moments of the reference, in files.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, kind: str, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a moment.

        Args:
            kind: Kind of the tensors.
            steps: Number of optimizer steps before.
            tensors: Unsharded tensors by name: [any] each.
        """
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, self._file(kind, steps))

    def get(self, kind: str, steps: int) -> dict[str, Tensor] | None:
        """The tensors of a moment by name, [any] each; None if there was no such moment.

        Args:
            kind: Kind of the tensors.
            steps: Number of optimizer steps before.
        """
        file = self._file(kind, steps)
        return torch.load(file, mmap=True) if file.exists() else None

    def moments(self) -> list[tuple[str, int]]:
        """Kinds and optimizer steps of all moments."""
        found = (file.stem.rpartition("-") for file in self._folder.glob("*.pt"))
        return sorted((kind, int(steps)) for kind, _, steps in found)

    def _file(self, kind: str, steps: int) -> Path:
        return self._folder / f"{kind}-{steps}.pt"


@dataclass
class Found:
    """What a comparison has found so far.

    Attributes:
        compared: Number of tensors or values.
        worst: Largest difference; None before the first.
        first: First difference that rounding does not explain.
    """

    compared: int = 0
    worst: Difference | None = None
    first: Difference | None = None

    def add(self, found: Difference) -> None:
        """Add a difference."""
        self.compared += 1
        if self.worst is None or found.ratio > self.worst.ratio:
            self.worst = found
        if self.first is None and not found.ok:
            self.first = found


@dataclass
class Comparison:
    """Compares the moments of one training.

    Attributes:
        reference: Moments of the reference.
        most: Function from a kind and the optimizer steps before to the largest difference that is allowed.
        found: Findings by kind.
        moments: Moments that have come.
    """

    reference: Reference
    most: Most
    found: dict[str, Found] = field(default_factory=dict)
    moments: list[tuple[str, int]] = field(default_factory=list)

    def take(self, kind: str, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare a moment.

        Args:
            kind: Kind of the tensors.
            steps: Number of optimizer steps before.
            tensors: Unsharded tensors by name: [any] each.
        """
        expected = self.reference.get(kind, steps)
        self.moments.append((kind, steps))
        moment = moment_in_words(kind, steps)
        kind = "initial weights" if kind == "weights" and not steps else kind
        most = self.most(kind, steps)
        found = self.found.setdefault(kind, Found())
        if expected is None:
            found.add(Difference(torch.inf, most, "a step that the reference does not make", moment, steps))
            return
        scale = scales(expected, SCALED_AS.get(kind, "weights"))
        for name in sorted(expected.keys() | tensors.keys()):
            ours, theirs = tensors.get(name), expected.get(name)
            if ours is None or theirs is None:  # no gradient is one of zeros
                present = theirs if ours is None else ours
                assert present is not None
                missing = "gradient" in kind and not present.any()
                found.add(Difference(0.0 if missing else torch.inf, most, name, moment, steps))
                continue
            apart = difference(ours, theirs, scale=scale[name])
            by = factor(ours, theirs, tolerance=most) if apart > most else None
            found.add(Difference(apart, most, name, moment, steps, by))


def moment_in_words(kind: str, steps: int) -> str:
    """When a moment is.

    Args:
        kind: Kind of the tensors.
        steps: Number of optimizer steps before.
    """
    if "gradient" in kind:
        return f"at the boundary of step {steps + 1}"
    return f"after step {steps}" if steps else "before a step"


def rows_of(
    run: str,
    comparison: Comparison,
    ranks: Sequence[Seen],
    reference: Sequence[Seen],
    *,
    topology: Topology,
    window: int,
    first_step: int,
) -> list[Row]:
    """All comparisons of a training.

    Args:
        run: Name of the training.
        comparison: Findings of rank 0.
        ranks: What each rank has seen.
        reference: What the ranks of the reference have seen.
        topology: Positions of the ranks.
        window: Micro-steps of all ranks in a window of accumulation.
        first_step: Number of windows that were trained before.
    """
    losses = _compared_losses(ranks, reference, comparison.most, window=window, first_step=first_step)
    found = {"losses": losses, **comparison.found}
    found["evaluation"] = _compared_evaluations(ranks, reference, comparison.most, window=window)
    found["optimizer steps"] = _compared_steps(ranks, reference, comparison)
    found["replicas"] = compared_replicas(ranks, topology)
    return [Row(run, what, each.compared, each.worst, each.first) for what, each in found.items() if each.worst]


def _compared_losses(
    ranks: Sequence[Seen], reference: Sequence[Seen], allowed: Most, *, window: int, first_step: int
) -> Found:
    """Compare the losses of all micro-steps; see :func:`rows_of`."""
    expected = {number: loss for seen in reference for number, loss in seen.losses.items()}
    ours = {number: loss for seen in ranks for number, loss in seen.losses.items()}
    found = Found()
    for number in sorted(expected.keys() | ours.keys()):
        if number < first_step * window:
            continue
        step, micro_step = divmod(number, window)
        most = allowed("losses", step)
        where = f"micro-batch {micro_step + 1} of {window} in step {step + 1}"
        if number not in expected or number not in ours:
            found.add(Difference(torch.inf, most, where, _before(step), step))
            continue
        apart = difference(
            torch.tensor(ours[number], dtype=torch.float64),
            torch.tensor(expected[number], dtype=torch.float64),
            scale=max(abs(expected[number]), 1e-3),
        )
        found.add(Difference(apart, most, where, _before(step), step))
    return found


def _compared_evaluations(ranks: Sequence[Seen], reference: Sequence[Seen], allowed: Most, *, window: int) -> Found:
    """Compare the outputs of evaluations; see :func:`rows_of`."""
    expected = {key: outputs for seen in reference for key, outputs in seen.evaluations.items()}
    found = Found()
    for key, outputs in sorted((key, outputs) for seen in ranks for key, outputs in seen.evaluations.items()):
        trained, number = key
        most = allowed("evaluation", trained // window)
        moment = f"after {trained % window} of {window} micro-batches of step {trained // window + 1}"
        theirs = expected.get(key)
        if theirs is None or len(theirs) != len(outputs):
            found.add(Difference(torch.inf, most, f"batch {number + 1}", moment, trained // window))
            continue
        for output, other in zip(outputs, theirs, strict=True):
            scale = max(float(other.double().abs().max()) if other.numel() else 0.0, 1e-3)
            apart = difference(output, other, scale=scale)
            found.add(Difference(apart, most, f"batch {number + 1}", moment, trained // window))
    return found


def compared_replicas(ranks: Sequence[Seen], topology: Topology) -> Found:
    """Compare the tensors of ranks that hold the same part, bit for bit.

    Args:
        ranks: What each rank has seen.
        topology: Positions of the ranks.
    """
    found = Found()
    for rank, seen in enumerate(ranks):
        other = ranks[topology.replication_group(rank)[0]]
        for moment in seen.shards if topology.replicas > 1 else ():
            names = seen.shards[moment].keys() | other.shards.get(moment, {}).keys()
            apart = [name for name in names if seen.shards[moment].get(name) != other.shards.get(moment, {}).get(name)]
            where = f"{min(apart)} ({moment[0]}) of rank {rank}" if apart else ""
            found.add(Difference(torch.inf if apart else 0.0, 0.0, where, moment_in_words(*moment), moment[1]))
    return found


def compared_loads(saved: Sequence[Seen], resumed: Sequence[Seen], steps: int) -> Found:
    """Compare what was saved and what was loaded, bit for bit: tensors, and generators of as many ranks.

    On another number of ranks each must have random numbers of its own.

    Args:
        saved: What the ranks have seen that saved.
        resumed: What the ranks have seen that resumed.
        steps: Optimizer steps of the checkpoint.
    """
    found = Found()
    first = min(resumed[0].generators)
    now = [seen.generators[first] for seen in resumed]
    before = [seen.generators.get(first) for seen in saved]
    for rank, state in enumerate(now):
        ok = state == before[rank] if len(saved) == len(resumed) else now.count(state) == 1
        found.add(Difference(0.0 if ok else torch.inf, 0.0, f"random numbers of rank {rank}", "after it was loaded"))
    return _loaded_tensors(found, saved[0], resumed[0], steps)


def _loaded_tensors(found: Found, saved: Seen, resumed: Seen, steps: int) -> Found:
    for kind in SAVED:
        before, after = saved.unsharded.get((kind, steps), {}), resumed.unsharded.get((kind, steps), {})
        for name in sorted(before.keys() | after.keys()):
            same = before.get(name) == after.get(name)
            found.add(Difference(0.0 if same else torch.inf, 0.0, f"{name} ({kind})", "when it was loaded"))
    return found


def _compared_steps(ranks: Iterable[Seen], reference: Sequence[Seen], comparison: Comparison) -> Found:
    found = Found()
    for rank, seen in enumerate(ranks):
        apart = seen.steps != reference[0].steps
        found.add(Difference(torch.inf if apart else 0.0, 0.0, f"rank {rank}: {seen.steps} steps", "at the end"))
    start = min((steps for kind, steps in comparison.moments if kind == "weights"), default=0)
    for kind, steps in comparison.reference.moments():
        due = steps > start or (steps == start and "gradient" in kind)
        if due and (kind, steps) not in comparison.moments:
            found.add(Difference(torch.inf, 0.0, f"no {kind}", moment_in_words(kind, steps), steps))
    return found


def _before(step: int) -> str:
    return f"after step {step}" if step else "before a step"
