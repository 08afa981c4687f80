"""In-memory checkpoints of a Trainer: what it resumes from after a death, and when it saves.

After a restart the newest step that all nodes together hold takes precedence over any checkpoint on a disk, which is
older. If no step is whole, the run resumes from the newest checkpoint on a disk, and says how many steps are lost; if
there is none, it ends in an error on all ranks: it never begins anew without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mics.checkpoint.content.trial_step import trained_bytes
from lightning_mics.collectives.agreement import on_rank_0
from lightning_mics.in_memory.reading import InMemoryCheckpoint
from lightning_mics.integrations._in_memory import NoWholeStepError, StartedJob, StepInMemory
from lightning_mics.topology import Topology


class InMemoryTraining:
    """In-memory checkpoints of one fit; every rank makes it, when process groups exist.

    Args:
        trainer: The Trainer that is about to fit.
        every: Number of optimizer steps between two saves.
        local_size: Number of ranks on each host.
        collect: Function that returns the content of a checkpoint, and this rank's own tensors.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        *,
        every: int,
        local_size: int,
        collect: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]],
    ) -> None:
        self._trainer = trainer
        self._every = every
        self._collect = collect
        self._started = StartedJob(local_size=local_size)
        self._job = self._started.job
        self._resume_start: Callable[..., None] = trainer._checkpoint_connector.resume_start
        vars(trainer._checkpoint_connector)["resume_start"] = self._start
        self._lost_from: int | None = None  # newest step of which a part is left, where no step is whole
        self._is_ready = self._is_reported = False
        self._waits_in_closure = False
        self._has_computed = False  # beside the copies of the last save

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """In place of Lightning's method: choose what to resume from."""
        del vars(self._trainer._checkpoint_connector)["resume_start"]
        chosen = checkpoint_path
        if self._trainer.state.fn == TrainerFn.FITTING:
            chosen = self._chosen(checkpoint_path)
        self._resume_start(chosen, weights_only=weights_only)
        self._tell_of_lost_steps(chosen)

    def _chosen(self, given: Any) -> Any:
        whole, seen = self._job.holdings.newest, self._job.holdings.newest_in_part
        if whole is not None:
            self._started.tell_of_other_ranks()
            if given:
                rank_zero_info(f"Resuming from {StepInMemory.of(whole)}, which takes precedence over {given}")
            return StepInMemory.of(whole)
        if not self._started.has_lost_steps:
            return given
        self._lost_from = 0 if seen is None else seen.step
        on_disk = given or on_rank_0(lambda: _last_on_disk(self._trainer))
        if on_disk is None:
            raise NoWholeStepError(
                f"{self._started.why()}, and there is no checkpoint on a disk: add a ModelCheckpoint with "
                "save_last=True, or pass ckpt_path. To begin anew, start the job with another MICS_KEEPER_TOKEN"
            )
        return on_disk

    def _tell_of_lost_steps(self, chosen: Any) -> None:
        if self._lost_from is None:
            return
        step = self._trainer._checkpoint_connector._loaded_checkpoint.get("global_step", 0)
        lost = f"at least {self._lost_from - step} steps" if self._lost_from else "all steps since then"
        rank_zero_warn(f"no step in memory is whole, so the run resumes from {chosen}, step {step}: {lost} are lost")

    def open(self, path: StepInMemory, *, weights_only: bool) -> InMemoryCheckpoint:
        """Open a step in memory; every rank calls it.

        Args:
            path: Name of the step.
            weights_only: Whether entries other than tensors must be plain data.
        """
        return self._job.open(path.stamp, name=path, weights_only=weights_only)

    # -- saving --------------------------------------------------------------------------------------------------------

    def begin(self, topology: Topology, *, device: torch.device) -> None:
        """Prepare to save, and say what that takes, when the model is sharded; every rank calls it.

        Args:
            topology: Positions of all ranks, as they were sharded.
            device: Device of this rank.

        Raises:
            HostMemoryError: On all ranks, if the hosts have too little memory.
        """
        hosts, strategy = self._started.begin(topology, device=device), self._trainer.strategy
        assert strategy.model is not None
        shard_bytes = trained_bytes(strategy.model, strategy.optimizers)
        if shard_bytes is not None:
            self._started.report(self._when(), self._job.expect(shard_bytes, hosts))
            self._is_reported = True
        self._is_ready = True

    def save_again(self) -> None:
        """See :meth:`~lightning_mics.in_memory.job.InMemoryJob.save_again`."""
        self._job.save_again()

    def is_due(self) -> bool:
        """Whether the optimizer step that has just ended is to be saved."""
        return self._is_ready and self._trainer.global_step % self._every == 0

    def saved_step(self) -> int:
        """The newest step of this rank that is on two nodes; waits for the one that is being saved."""
        return self._job.saver.wait_until_protected() if self._is_ready else -1

    def save(self, read_saved: Callable[[], int]) -> None:
        """Save the optimizer step that has just ended, beside what follows; every rank calls it.

        Args:
            read_saved: See :meth:`~lightning_mics.in_memory.saver.StepSaver.save`.
        """
        first = self._job.saver.slot_bytes == 0
        self._has_computed = False
        state, random_state = self._collect()
        self._job.save(
            self._trainer.global_step,
            model_state=state.pop("state_dict"),
            optimizer_states=state.pop("optimizer_states", []),
            meta=state,
            rank_state=random_state,
            read_protected=read_saved,
        )
        if first and not self._is_reported:
            self._started.report_saved(self._when())

    def _when(self) -> str:
        return "every optimizer step" if self._every == 1 else f"every {self._every} optimizer steps"

    def confirm(self) -> None:
        """See :meth:`~lightning_mics.in_memory.saver.StepSaver.confirm`; around each backward, and in validations."""
        if self._is_ready:
            self._has_computed = True
            self._job.saver.confirm()

    def before_optimizer_step(self, *_: Any) -> None:
        """Let an optimizer step: what it changes has been copied, and no more than one step may be lost.

        A step to be saved waits until the one that was saved before is on two nodes, so that there is always one that
        is whole. A hook of optimizers; inside of :meth:`beside` it is done later.
        """
        if not self._is_ready or self._waits_in_closure:
            return
        if (self._trainer.global_step + 1) % self._every == 0:
            self._job.saver.wait_until_protected()
        else:
            self._job.saver.confirm(wait=True)

    @contextmanager
    def beside(self, closure: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        """A step of an optimizer whose closure, the forward and backward, runs beside the copies.

        Args:
            closure: The closure.

        Yields:
            A closure to step with in its place.
        """

        def run() -> Any:
            result = closure()
            self._waits_in_closure = False
            self.before_optimizer_step()
            return result

        if self._is_ready:
            self._job.saver.confirm(wait=self._has_computed)  # then the way to another node is beside the closure
        self._waits_in_closure = True
        try:
            yield run
        finally:
            self._waits_in_closure = False

    def close(self, *, finished: bool) -> None:
        """End of the fit; every rank calls it.

        Args:
            finished: Whether it has ended by itself.
        """
        vars(self._trainer._checkpoint_connector).pop("resume_start", None)
        self._started.close(finished=finished)


def _last_on_disk(trainer: pl.Trainer) -> str | None:
    """The newest checkpoint that ``ckpt_path="last"`` would find."""
    if not any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none
        found = trainer._checkpoint_connector._parse_ckpt_path(
            TrainerFn.FITTING, "last", model_provided=True, model_connected=True
        )
    return None if found is None else str(found)
