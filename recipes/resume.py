"""Where a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and what it says about the run that wrote it."""

    path: Path
    step: int
    val_loss: float | None


def find_saved_run(resume: str | None, *, checkpoint_dir: str | Path) -> SavedRun | None:
    """The run to continue: None for a fresh start, ``"last"`` for the latest in ``checkpoint_dir``, else a path.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    if resume is None:
        return None
    path = Path(checkpoint_dir, "last.ckpt") if resume == "last" else Path(resume)
    if not path.exists():
        raise FileNotFoundError(
            f"resume=last: there is no checkpoint in {checkpoint_dir} yet; run once without resume, or use resume=PATH"
            if resume == "last"
            else f"resume={resume}: there is no such checkpoint; use resume=last for the latest of this run"
        )
    facts = path / "meta.pt" if path.is_dir() else path  # a sharded checkpoint is a folder, a full one a file
    checkpoint = torch.load(facts, map_location="cpu", weights_only=False, mmap=True)
    return SavedRun(path=path, step=checkpoint["global_step"], val_loss=checkpoint.get("val_loss"))


def steps_to_reach(max_steps: int, saved: SavedRun | None) -> int:
    """The step at which to stop: ``max_steps``; or, if the saved run was already there, as many steps again."""
    if saved is None or saved.step < max_steps:
        return max_steps
    return saved.step + max_steps
