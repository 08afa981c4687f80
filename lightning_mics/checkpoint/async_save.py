"""Asynchronous saving: a thread writes copies while training continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.dcp.save_planner import HostBuffers
from lightning_mics.checkpoint.errors import all_ranks_answer
from lightning_mics.checkpoint.saving import prepare_sharded
from lightning_mics.checkpoint.storage.path import StoragePath
from lightning_mics.collectives.control_plane import control_plane

MOST_UNFINISHED = 2  # as with ModelCheckpoint(save_last=True), which saves twice in a row; each takes memory for a copy


class ShardedSaving:
    """Saves the sharded checkpoints of a run, asynchronously or synchronously.

    Args:
        asynchronous: Whether checkpoints are written while training continues, where the caller of :meth:`save` allows.
        timeout: Timeout of the collectives of asynchronous saves; None is the backend's default.
    """

    def __init__(self, *, asynchronous: bool, timeout: timedelta | None) -> None:
        self._asynchronous = asynchronous
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
        names: FullNames | None = None,
        synchronous: bool = False,
        show_progress: bool = False,
    ) -> None:
        """Save a checkpoint; every rank calls it.

        Args:
            path: See :func:`~lightning_mics.checkpoint.saving.save_sharded`.
            model_state: Tensors by FQN; sharded ones are DTensors.
            optimizer_states: States of the optimizers, in their order.
            meta: Entries that are not sharded.
            rank_state: Tensors that belong to this rank alone.
            names: Keys of the user for the model and the optimizers.
            synchronous: Whether the checkpoint must be complete on return.
            show_progress: Whether this rank displays a progress bar while it waits.

        Raises:
            OSError: If storage fails during this call.
            RuntimeError: If anything else fails, or if an earlier asynchronous save has failed.
        """
        prepare = partial(
            prepare_sharded,
            path,
            model_state=model_state,
            optimizer_states=optimizer_states,
            meta=meta,
            rank_state=rank_state,
            names=names,
            group=self._group_of_all(),
        )
        if synchronous or not self._asynchronous:
            self.wait()
            prepare(buffers=None, show_progress=show_progress)()
            return

        def prepare_copies(buffers: HostBuffers) -> Callable[[], None]:
            return all_ranks_answer(f"saving {path}", timeout=self._timeout)(prepare(buffers=buffers))

        self._background.save(str(path), prepare_copies)

    def after_saves(self, action: Callable[[], None]) -> None:
        """Run ``action`` after all unfinished saves, immediately if there are none; never if one of them fails."""
        self._background.after_saves(action)

    def wait(self) -> None:
        """Wait until all asynchronous saves have finished; every rank calls it.

        Raises:
            RuntimeError: If one failed. Earlier checkpoints are unchanged.
        """
        self._background.wait()

    def _group_of_all(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks; for asynchronous saves one of their own, made when it is first needed."""
        if not self._asynchronous:
            return control_plane(self._timeout).group
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._group


class BackgroundSaving:
    """A thread that writes checkpoints one after the other, and runs actions that depend on them."""

    def __init__(self) -> None:
        self._started: ThreadPoolExecutor | None = None  # at the first save: a strategy that has not run can be copied
        self._unfinished: deque[_Save] = deque()
        self._later: list[Future[None]] = []
        self._free_buffers: list[HostBuffers] = []

    @property
    def _thread(self) -> ThreadPoolExecutor:
        if self._started is None:
            self._started = ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix="checkpoint",
                # a new thread would begin on the first GPU of the node
                initializer=_device_of_this_thread(),
            )
        return self._started

    def save(self, name: str, prepare: Callable[[HostBuffers], Callable[[], None]]) -> None:
        """Copy a checkpoint now and write it later; blocks while :data:`MOST_UNFINISHED` saves are unfinished.

        Args:
            name: Name of the checkpoint, for errors.
            prepare: Function that copies into the buffers it is given and returns the function that writes them, which
                another thread calls.

        Raises:
            RuntimeError: If an earlier save that this one has waited for has failed.
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
        """Run ``action`` after all unfinished saves, immediately if there are none; never if one of them fails."""
        before = [save.done for save in self._unfinished]
        if not before:
            action()
            return

        def run_unless_failed() -> None:
            if not any(done.exception() for done in before):
                action()

        self._later.append(self._thread.submit(run_unless_failed))

    def wait(self) -> None:
        """Wait until all saves and all actions after them have finished.

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
                f"saving checkpoint {save.name} asynchronously failed: {error}; earlier ones are unchanged"
            ) from error


def _device_of_this_thread() -> Callable[[], None] | None:
    """What makes the current GPU of this thread that of another one; None if CUDA is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


@dataclass(frozen=True)
class _Save:
    name: str
    done: Future[None]
