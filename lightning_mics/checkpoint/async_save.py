"""Asynchronous saving: a thread writes copies while training continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_mics.checkpoint.dcp.save_planner import HostBuffers
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.saving import prepare_sharded
from lightning_mics.checkpoint.storage.path import StoragePath

MOST_UNFINISHED = 2  # as with ModelCheckpoint(save_last=True), which saves twice in a row; each takes memory for a copy


@dataclass(frozen=True)
class _Save:
    name: str
    done: Future[None]


class BackgroundSaving:
    """One thread that writes checkpoints, and what is to be done after them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._unfinished: deque[_Save] = deque()
        self._later: list[Future[None]] = []
        self._free_buffers: list[HostBuffers] = []

    def save(self, name: str, prepare: Callable[[HostBuffers], Callable[[], None]]) -> None:
        """Take copies now and write them later; waits while :data:`MOST_UNFINISHED` saves are.

        Args:
            name: Of the checkpoint, for errors.
            prepare: Copies into the buffers it is given, and returns what writes them, on another thread.

        Raises:
            RuntimeError: If an earlier save that must end now has failed.
        """
        while len(self._unfinished) >= MOST_UNFINISHED:
            self._finish(self._unfinished.popleft())
        buffers = self._free_buffers.pop() if self._free_buffers else HostBuffers()
        write = prepare(buffers)

        def write_and_free() -> None:
            try:
                write()
            finally:
                self._free_buffers.append(buffers)

        self._unfinished.append(_Save(name, self._thread.submit(write_and_free)))

    def after_saves(self, action: Callable[[], None]) -> None:
        """Run ``action`` when what is being saved now is there, at once if nothing is; not at all if that fails."""
        before = [save.done for save in self._unfinished]
        if not before:
            action()
            return

        def run_unless_failed() -> None:
            if not any(done.exception() for done in before):
                action()

        self._later.append(self._thread.submit(run_unless_failed))

    def wait(self) -> None:
        """Wait until all is written and done.

        Raises:
            RuntimeError: If a save has failed.
        """
        failed: RuntimeError | None = None
        while self._unfinished:
            try:
                self._finish(self._unfinished.popleft())
            except RuntimeError as error:
                failed = failed or error
        later, self._later = self._later, []
        if failed is not None:
            raise failed
        for action in later:
            action.result()

    def _finish(self, save: _Save) -> None:
        error = save.done.exception()
        if error is not None:
            raise RuntimeError(
                f"checkpoint {save.name}, written beside training, failed: {error}; earlier ones are as they were"
            ) from error


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
            path: As of :func:`~lightning_mics.checkpoint.saving.save_sharded`, and so are the following.
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
            prepare_sharded,
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
