"""Where a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_mics.checkpoint.dcp.unpickling import load_value
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.storage.folder import META_FILE, is_sharded
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, exists, is_local, storage_path


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and what it says about the run that wrote it."""

    path: StoragePath
    step: int
    val_loss: float | None


def find_saved_runs(
    resume: str | None, *, checkpoint_dir: str | Path, say: Callable[[str], object] = print
) -> list[SavedRun]:
    """The runs to continue, the best first: none for a fresh start, one for a path or a URL.

    For ``"last"`` and ``"auto"`` it is the latest in ``checkpoint_dir``, followed by those before it, in case it turns
    out to be damaged; where there is none ``"auto"`` starts afresh. Those whose own facts are damaged are left out, and
    ``say`` is told.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        DamagedCheckpointError: If there is none that is whole.
    """
    if resume is None:
        return []
    if resume not in ("last", "auto"):
        if not exists(storage_path(resume)):
            raise FileNotFoundError(
                f"resume={resume}: there is no such checkpoint; use resume=last for the latest of this run"
            )
        return [_read(storage_path(resume))]
    runs, damages = [], []
    for path in filter(_is_checkpoint, storage_path(checkpoint_dir).glob("*.ckpt")):
        try:
            runs.append(_read(path))
        except DamagedCheckpointError as damage:
            damages.append(damage)
            say(f"{damage}; it is left out")
    if damages and not runs:
        raise damages[0]
    if not runs and resume == "last":
        raise FileNotFoundError(
            f"resume=last: there is no checkpoint in {checkpoint_dir} yet; run once without resume, or use resume=PATH"
        )
    return sorted(runs, key=lambda run: (run.step, run.path.name == "last.ckpt"), reverse=True)


def steps_to_reach(max_steps: int, saved: SavedRun | None) -> int:
    """The step at which to stop: ``max_steps``; or, if the saved run was already there, as many steps again."""
    if saved is None or saved.step < max_steps:
        return max_steps
    return saved.step + max_steps


def _is_checkpoint(path: StoragePath) -> bool:
    """A link may have lost what it points to; in a store, a name may stand for what a killed job has left."""
    return exists(path) and (is_local(path) or path.is_file() or is_sharded(path))


def _read(path: StoragePath) -> SavedRun:
    """A sharded checkpoint is a folder, of which one file has the facts; a full one is a file."""
    content = path
    if exists(path / MANIFEST_FILE):
        manifest = Manifest.read(path)
        content = manifest.content(path)
        problems = manifest.problems(path, [META_FILE])
        if problems:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problems[0]}")
    facts = content / META_FILE if path.is_dir() else path
    checkpoint = load_value(facts, name=str(facts), weights_only=True, mapped=facts is path)
    return SavedRun(path=path, step=checkpoint["global_step"], val_loss=checkpoint.get("val_loss"))
