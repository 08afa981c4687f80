"""Sharded checkpoints of a run, one after the other: written at once, or beside training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_mics import checkpoint
from lightning_mics.background_saving import BackgroundSaving
from lightning_mics.save_planner import HostBuffers
from lightning_mics.silent_ranks import all_ranks_answer
from lightning_mics.storage_path import StoragePath


class ShardedSaving:
    """Saves the sharded checkpoints of a run.

    Args:
        beside_training: Whether they are written while training goes on, where the caller allows it.
        timeout: For what the ranks tell each other meanwhile.
    """

    def __init__(self, *, beside_training: bool, timeout: timedelta | None) -> None:
        self._beside_training = beside_training
        self._timeout = timeout
        self._background = BackgroundSaving()
        self._group: dist.ProcessGroup | None = None

    def save(
        self,
        path: StoragePath,
        *,
        model_state: dict[str, Any],
        optimizer_states: Sequence[dict[str, Any]],
        meta: dict[str, Any],
        rank_state: Mapping[str, Tensor] | None = None,
        at_once: bool = False,
        show_progress: bool = False,
    ) -> None:
        """Save a checkpoint; every rank calls it.

        Args:
            path: As of :func:`~lightning_mics.checkpoint.save_sharded`, and so are the following.
            model_state: Tensors by parameter name.
            optimizer_states: One per optimizer.
            meta: What is not sharded.
            rank_state: What is of this rank alone.
            at_once: Whether it must be there on return.
            show_progress: Whether this rank shows a progress bar while it waits.

        Raises:
            OSError: If storage fails, now or for an earlier checkpoint that was written beside training.
            RuntimeError: Likewise if anything else fails.
        """
        prepare = partial(
            checkpoint.prepare_sharded,
            path,
            model_state=model_state,
            optimizer_states=optimizer_states,
            meta=meta,
            rank_state=rank_state,
            group=self._group_of_all(),
        )
        if at_once or not self._beside_training:
            self.wait()
            prepare(buffers=None, show_progress=show_progress)()
            return

        def prepare_copies(buffers: HostBuffers) -> Callable[[], None]:
            return all_ranks_answer(f"saving {path}", timeout=self._timeout)(prepare(buffers=buffers))

        self._background.save(str(path), prepare_copies)

    def after_saves(self, action: Callable[[], None]) -> None:
        """Run ``action`` when what is being written now is there, at once if nothing is; not at all if that fails."""
        self._background.after_saves(action)

    def wait(self) -> None:
        """Wait until all checkpoints are there that are being written beside training; every rank calls it.

        Raises:
            RuntimeError: If one failed. Those saved earlier are as they were.
        """
        self._background.wait()

    def _group_of_all(self) -> dist.ProcessGroup | None:
        """All ranks on the host, for what they say about checkpoints beside training; made when it is first needed."""
        if self._beside_training and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._group
