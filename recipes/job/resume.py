"""The checkpoint that a run resumes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.opening import open_checkpoint
from lightning_mics.checkpoint.storage.folder import META_FILE, is_sharded
from lightning_mics.checkpoint.storage.manifest import raise_if_corrupted
from lightning_mics.checkpoint.storage.path import StoragePath, exists, is_local, storage_path


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and its facts about the run that wrote it.

    Attributes:
        path: Path or URL of the checkpoint.
        step: Optimizer steps before it was saved.
        val_loss: Validation loss that it was saved with, or None.
    """

    path: StoragePath
    step: int
    val_loss: float | None


def find_saved_runs(
    resume: str | None, *, checkpoint_dir: str | Path, say: Callable[[str], object] = print
) -> list[SavedRun]:
    """Find the checkpoints to resume from, the best first: none for a fresh start, one for a path or a URL.

    For ``"last"`` and ``"auto"`` it is the latest in ``checkpoint_dir``, followed by earlier ones, in case it is
    corrupted; without any, ``"auto"`` starts afresh. Checkpoints whose facts are corrupted are left out with a message.

    Args:
        resume: Path or URL of a checkpoint, "last", "auto", or None for a fresh start.
        checkpoint_dir: Folder of the run's checkpoints.
        say: Function to call with each message.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        DamagedCheckpointError: If all are corrupted.
    """
    if resume is None:
        return []
    if resume not in ("last", "auto"):
        if not exists(storage_path(resume)):
            raise FileNotFoundError(
                f"resume={resume}: there is no such checkpoint; use resume=last for the latest of this run"
            )
        return [_read(storage_path(resume))]
    runs, corrupted = [], []
    for path in filter(_is_checkpoint, storage_path(checkpoint_dir).glob("*.ckpt")):
        try:
            runs.append(_read(path))
        except DamagedCheckpointError as error:
            corrupted.append(error)
            say(f"{error}; it is left out")
    if corrupted and not runs:
        raise corrupted[0]
    if not runs and resume == "last":
        raise FileNotFoundError(
            f"resume=last: there is no checkpoint in {checkpoint_dir} yet; run once without resume, or use resume=PATH"
        )
    return sorted(runs, key=lambda run: (run.step, run.path.name == "last.ckpt"), reverse=True)


def steps_to_reach(max_steps: int, saved: SavedRun | None) -> int:
    """The optimizer step to stop at: ``max_steps``, or ``max_steps`` more if the saved run has reached it already.

    Args:
        max_steps: Optimizer steps of a run.
        saved: The run to resume; None for a fresh start.
    """
    if saved is None or saved.step < max_steps:
        return max_steps
    return saved.step + max_steps


def _is_checkpoint(path: StoragePath) -> bool:
    """Whether a path is a checkpoint: a link may be dangling, a folder in a store may be left by a killed job."""
    return exists(path) and (is_local(path) or path.is_file() or is_sharded(path))


def _read(path: StoragePath) -> SavedRun:
    """Read the facts in a checkpoint; of a sharded one only the file with the facts is read and checked."""
    if path.is_dir():
        opened = open_checkpoint(path)
        raise_if_corrupted(path, opened.problems([META_FILE]))
        facts = opened.meta(weights_only=True)
    else:
        facts = load_value(path, name=str(path), weights_only=True, mapped=True)
    return SavedRun(path=path, step=facts["global_step"], val_loss=facts.get("val_loss"))
