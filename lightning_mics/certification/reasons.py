"""What differences point to, in words: the earliest one says most, as everything after it follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_mics.certification.rows import Row

DOCS = "docs/what-works.md"
IN_ORDER = (  # of what is compared, between two optimizer steps
    "loaded bits",
    "hyperparameters",
    "optimizer states",
    "initial weights",
    "weights",
    "replicas",
    "buffers",
    "losses",
    "evaluation",
    "gradients",
    "clipped gradients",
    "optimizer steps",
)


def reasons_for(rows: Sequence[Row], failures: Mapping[str, str], *, changing_buffers: Sequence[str] = ()) -> list[str]:
    """What differences point to, where a reason is known.

    Args:
        rows: The comparisons.
        failures: Errors by training.
        changing_buffers: Names of the buffers that training changes.
    """
    found = [reason for words, reason in OF_ERRORS.items() if any(words in error for error in failures.values())]
    wrong = [row for row in rows if row.first is not None]
    runs = list(dict.fromkeys(row.run for row in wrong))
    if not runs:
        return found
    of_first = [row for row in wrong if row.run == runs[0]]
    earliest = min(of_first, key=lambda row: (_steps(row), IN_ORDER.index(row.what)))
    return [*found, _reason(earliest, resumed="resumed" in runs[0], changing_buffers=changing_buffers)]


OF_ERRORS = {
    "ranks take different ways": "ranks call blocks in another order, or not equally often: layer drop, early exit or "
    f"experts by rank need allow_unused=True; see {DOCS}#ranks-that-take-different-ways",
    "mixed torch.Tensor and DTensor": "weights are used while they are sharded, without a call of their block; see "
    f"{DOCS}#blocks-and-weights-that-are-used-but-not-called",
}


def _steps(row: Row) -> int:
    return 0 if row.first is None else row.first.steps


def _reason(row: Row, *, resumed: bool, changing_buffers: Sequence[str]) -> str:
    assert row.first is not None
    factor, where = row.first.factor, row.first.where
    if resumed:
        return (
            "the training itself agrees, and what it loads does not: state that no checkpoint holds, or a hook that "
            f"changes what is saved or loaded; see {DOCS}#checkpoints"
        )
    if row.what in ("gradients", "clipped gradients") and factor is not None:
        return (
            f"gradients are {factor:.6g} times the right ones: a division by the number of ranks or micro-steps that "
            "is done twice or never, or a hook that scales them"
        )
    if row.what == "buffers":
        changes = "each rank changes it from its own data" if where in changing_buffers else "ranks set it differently"
        return f"buffer {where!r} is not the same: {changes}; see {DOCS}#hooks-buffers-and-modules"
    if row.what == "losses" and row.first.steps:
        return (
            "weights agree and losses do not: weights that change inside of a step, or a value that a rank keeps from "
            f"one step to the next; see {DOCS}#weights-gradients-and-flags-that-programs-change"
        )
    return REASONS[row.what]


REASONS = {
    "initial weights": "the first weights depend on the rank, or on something besides torch's seed: draw them in the "
    "constructor, in `configure_model` or in `reset_parameters`",
    "losses": "the forward itself differs, before any step: it depends on the rank or on the process, as a random draw "
    "seeded by rank, a value from the environment, or a draw that is not from a generator of its own",
    "evaluation": "training agrees and evaluation does not: modules that behave otherwise in `eval()`, or weights that "
    f"an evaluation changes; see {DOCS}#weights-gradients-and-flags-that-programs-change",
    "gradients": "losses agree and gradients do not: a change in place while weights are unsharded, a gradient hook, "
    f"or a block that runs without being called; see {DOCS}#hooks-buffers-and-modules",
    "clipped gradients": "gradients agree until they are clipped: a norm of one rank's shard alone; use "
    "`self.clip_gradients` or the Trainer's gradient_clip_val",
    "weights": "gradients agree and updates do not: an optimizer that looks at whole tensors, as for norms, matrices "
    f"or factored moments, or a parameter that something else changes; see {DOCS}#optimizers",
    "optimizer states": "gradients agree and the optimizer's states do not: an optimizer that looks at whole tensors, "
    f"as for norms, matrices or factored moments; see {DOCS}#optimizers",
    "hyperparameters": "numbers of the optimizer's groups or of the schedulers differ: set by a hook that depends on "
    "the rank, or by a scheduler that looks at what a rank sees",
    "replicas": "replicas have drifted apart: an update that depends on the rank, or on an order of summation",
    "loaded bits": f"what was loaded is not what was saved; see {DOCS}#checkpoints",
    "optimizer steps": "ranks made more or fewer optimizer steps than the reference: accumulation that depends on the "
    "rank, or steps that are skipped",
}
