"""Checkpoints that are written while training goes on.

::

    training       step   copy   step     step      step   copy   step
    background                   write, publish, remove            write, ...

What is written is copied first, which is all that training waits for. One thread writes, one checkpoint after the
other. The ranks talk to each other meanwhile, so it needs a process group that nothing else uses, and all ranks must
ask for the same in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lightning_mics.save_planner import HostBuffers

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
