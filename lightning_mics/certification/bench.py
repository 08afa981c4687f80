"""The trainings of one certification: reference, job, control, and what is resumed, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy

from lightning_mics.certification.comparing import Comparison, Found, Reference, compared_loads, rows_of
from lightning_mics.certification.differences import TIMES_ORDER, AsByOrder, AsRounded, Most
from lightning_mics.certification.modules import Preparation
from lightning_mics.certification.ranks import Answer, on_ranks
from lightning_mics.certification.reasons import reasons_for
from lightning_mics.certification.recorder import LEAST_EPS, LEAST_RATE, Seen
from lightning_mics.certification.report import CannotCertifyError, CertifyReport
from lightning_mics.certification.rows import Row
from lightning_mics.certification.scaling import ScaledJob
from lightning_mics.certification.training import SAVED_AFTER, OneProcess, PlainReplicas, Training
from lightning_mics.integrations.trainer.strategy import MiCSStrategy


class Bench:
    """The trainings of one certification, one after the other.

    Args:
        jobs: The job and its control, whose number of ranks divides the job's.
        preparation: How the module is made.
        batches: Micro-batches.
        folder: Folder for files of the trainings.
        make_strategy: Function from options to a strategy.
        accumulate: Micro-steps of a rank in an optimizer step.
        clip_algorithm: How gradients are clipped.
        seconds: Longest duration of each training.
    """

    def __init__(
        self,
        jobs: Sequence[ScaledJob],
        preparation: Preparation,
        batches: Sequence[Any],
        folder: Path,
        *,
        make_strategy: Callable[..., MiCSStrategy],
        accumulate: int,
        clip_algorithm: str,
        seconds: float,
    ) -> None:
        self._jobs = jobs
        self._preparation = preparation
        self._make_strategy = make_strategy
        self._folder = folder
        self._seconds = seconds
        self._reference = Reference(folder)
        self._of_reference: list[Seen] = []
        self._rows: list[Row] = []
        self._failures: dict[str, str] = {}
        self._is_alone = False  # whether the reference is one process
        self._traces: dict[str, str] = {}
        self.notes: list[str] = []
        ranks = jobs[0].topology.world_size
        self._base = Training(
            world_size=ranks,
            micro_steps=accumulate,
            ranks=ranks,
            make_module=self._module,
            make_strategy=MiCSStrategy,
            batches=batches,
            folder=folder,
            clip_algorithm=clip_algorithm,
        )

    @property
    def window(self) -> int:
        """Micro-steps of all ranks in an optimizer step."""
        return self._base.world_size * self._base.micro_steps

    # -- all of it -----------------------------------------------------------------------------------------------------

    def compare_all(self, resume_ranks: int | None, precision: str | None = None) -> CertifyReport:
        """Run the reference and all trainings, and compare.

        Args:
            resume_ranks: Number of ranks that resume the checkpoint of the others; None takes half as many.
            precision: Lightning's name of the precision to compare in as well; None compares in none.
        """
        ranks = self._base.world_size
        others = resume_ranks or max(1, ranks // 2)
        if self.window % others:
            raise ValueError(
                f"resume_ranks={others} does not divide the {self.window} micro-batches of a step: {ranks} ranks with "
                f"accumulate={self._base.micro_steps}"
            )
        automatic = self._prepare()
        reference = self._run_reference(automatic=automatic)
        job, control = self._jobs
        saved = self._folder / "sharded.ckpt"
        first = self._run(job.name, job, save=saved)
        if self._is_alone and first is not None and not all(row.ok for row in self._rows):
            reference = self._run_replicas("one process trains otherwise")
            first = self._run(job.name, job, save=saved)
            if all(row.ok for row in self._rows):  # else it is no matter of ranks alone
                self.notes.append(
                    "one process trains otherwise: something depends on the rank, or on how many micro-batches or "
                    "steps a process has seen, as under DistributedDataParallel"
                )
        if first is not None:
            self._resume(f"{job.name}, resumed", job, saved, first)
            if self._is_alone:
                self._resume(f"{job.name}, resumed on {others} ranks", with_ranks(job, others), saved, first)
        full = self._folder / "full.ckpt"
        plain = self._run(control.name, control, save=full, state_dict_type="full")
        if plain is not None:
            self._resume(f"{control.name}, one file, resumed as the job", job, full, plain)
        self._note_differences_of_setting()
        changing = self._of_reference[0].changing_buffers
        if precision is not None and self._is_alone:
            self._compare_in(precision, job)
        elif precision is not None:
            self.notes.append(f"in {precision} it was not compared: one rank is no reference for it")
        return CertifyReport(
            module=self.name,
            reference=reference,
            runs={job.name: str(job), control.name: str(control)},
            rows=self._rows,
            failures=self._failures,
            traces=self._traces,
            notes=self.notes,
            reasons=reasons_for(self._rows, self._failures, changing_buffers=changing),
        )

    # -- the module and the reference ----------------------------------------------------------------------------------

    def _module(self) -> pl.LightningModule:
        return self._preparation.module()[0]

    def _prepare(self) -> bool:
        """Learn what the module is; returns whether its optimization is automatic."""
        (large,) = self._asked(1, self._preparation.is_large)
        self._preparation = replace(self._preparation, on_meta=large)

        def look() -> tuple[str, list[str], bool, dict[str, Any]]:
            module, notes = self._preparation.module()
            inner = getattr(module, "module", module)
            return type(inner).__name__, notes, module.automatic_optimization, self._preparation.known

        ((self.name, shrunk, automatic, known),) = self._asked(1, look)
        self._preparation = replace(self._preparation, known=known)
        self.notes += [f"shrunk: {note}" for note in shrunk]
        return bool(automatic)

    def _run_reference(self, *, automatic: bool) -> str:
        """Train the reference; returns what it is, in words."""
        try:
            return self._reference_in(automatic=automatic)
        except CannotCertifyError as error:
            failed = str(error).partition("\n")[0]
        self._base = replace(self._base, precision="32-true")
        described = self._reference_in(automatic=automatic)
        self.notes.append(f"in float32, as float64 fails: {failed}")
        return described

    def _reference_in(self, *, automatic: bool) -> str:
        block_classes = self._jobs[0].options.get("block_classes")
        if automatic:
            alone = replace(
                self._base,
                world_size=1,
                micro_steps=self.window,
                make_strategy=partial(OneProcess, block_classes),
            )
            seen = self._asked(1, partial(alone.run, self._reference.put))
            if not seen[0].changing_buffers:
                self._is_alone = True
                return self._is_reference(seen, "one process")
        return self._run_replicas("its buffers depend on what a rank sees" if automatic else "it is optimized by hand")

    def _run_replicas(self, why: str) -> str:
        """Train the reference as replicas, in place of one process; returns what it is, in words."""
        self._is_alone, self._rows = False, []
        block_classes = self._jobs[0].options.get("block_classes")
        replicas = replace(self._base, make_strategy=partial(PlainReplicas, block_classes))
        seen = self._asked(replicas.world_size, partial(replicas.run, self._reference.put))
        return self._is_reference(seen, f"DistributedDataParallel on {replicas.world_size} ranks, as {why}")

    def _is_reference(self, seen: list[Seen], described: str) -> str:
        self._of_reference = seen
        self._base = replace(self._base, clip=seen[0].clip)
        gradients = [self._reference.get(*moment) for moment in self._reference.moments() if moment[0] == "gradients"]
        if not any(gradients):
            raise CannotCertifyError(f"nothing is trained: no optimizer of {self.name} makes a step")
        if any(loss != loss for each in seen for loss in each.losses.values()):
            raise CannotCertifyError(f"{self.name} has a loss that is not a number, by itself in one process")
        return described

    def _asked(self, world_size: int, function: Callable[[], Any]) -> list[Any]:
        """Values of a function on ranks of which none may fail."""
        answers = on_ranks(world_size, function, seconds=self._seconds)
        for answer in answers:
            if answer.error:
                raise CannotCertifyError(answer.error, answer.trace)
        return [answer.value for answer in answers]

    # -- the trainings -------------------------------------------------------------------------------------------------

    def _run(
        self, name: str, job: ScaledJob, *, save: Path | None = None, resume: Path | None = None, **saving: Any
    ) -> list[Seen] | None:
        """Train, and compare with the reference; returns what ranks have seen, None if one has failed."""
        ranks = job.topology.world_size
        make: Callable[[], Strategy] = partial(self._make_strategy, **job.options, **saving)
        training = replace(
            self._base,
            world_size=ranks,
            micro_steps=self.window // ranks,
            make_strategy=make,
            save=save,
            resume=resume,
        )
        most = AsRounded(torch.float64 if training.precision == "64-true" else torch.float32)
        return self._compare(name, job, training, most)

    def _compare(self, name: str, job: ScaledJob, training: Training, most: Most) -> list[Seen] | None:
        ranks = training.world_size

        def compared() -> tuple[Seen, Comparison]:
            comparison = Comparison(self._reference, most)
            return training.run(comparison.take), comparison

        answers: list[Answer[tuple[Seen, Comparison]]] = on_ranks(ranks, compared, seconds=self._seconds)
        if any(answer.died for answer in answers):  # as in gloo once in some hundred trainings (torch 2.13)
            self.notes.append(f"{name}: a process died, so it was run again")
            answers = on_ranks(ranks, compared, seconds=self._seconds)
        failed = [answer for answer in answers if answer.error]
        if failed:
            telling = _most_telling(failed)
            self._failures[name], self._traces[name] = telling.error, telling.trace
            return None
        values = [answer.value for answer in answers if answer.value is not None]
        seen, comparison = [value[0] for value in values], values[0][1]
        self._rows += rows_of(
            name,
            comparison,
            seen,
            self._of_reference,
            topology=job.topology,
            window=self.window,
            first_step=SAVED_AFTER if training.resume else 0,
        )
        return seen

    def _compare_in(self, precision: str, job: ScaledJob) -> None:
        """Compare the job in its precision with one rank, up to what another order of summation makes there."""
        folder = self._folder / precision
        folder.mkdir()
        options = {**job.options, "ranks_per_node": 1, "partition_size": 1, "hierarchical": "auto"}
        alone = replace(
            self._base,
            world_size=1,
            micro_steps=self.window,
            make_strategy=partial(self._make_strategy, **options),
            precision=precision,
        )
        self._reference = Reference(folder)
        self._of_reference = self._asked(1, partial(alone.run, self._reference.put))

        def backwards() -> tuple[Seen, Comparison]:
            comparison = Comparison(self._reference, AsByOrder({}))
            return replace(alone, backwards=True).run(comparison.take), comparison

        ((seen, comparison),) = self._asked(1, backwards)
        one = replace(job.topology, world_size=1, ranks_per_node=1, partition_size=1)
        spread = rows_of("", comparison, [seen], self._of_reference, topology=one, window=self.window, first_step=0)
        most = AsByOrder({row.what: row.worst.relative for row in spread if row.worst.relative < 1})
        ranks = job.topology.world_size
        make: Callable[[], Strategy] = partial(self._make_strategy, **job.options)
        training = replace(
            self._base, world_size=ranks, micro_steps=self.window // ranks, make_strategy=make, precision=precision
        )
        self._compare(f"{job.name}, {precision}", job, training, most)
        self.notes.append(
            f"in {precision} it was compared with one rank of the strategy: {TIMES_ORDER} times what the opposite "
            "order of micro-batches makes there is allowed"
        )

    def _resume(self, name: str, job: ScaledJob, path: Path, saved: list[Seen]) -> None:
        """Resume a checkpoint, and compare it with what was saved, and the training with the reference."""
        resumed = self._run(name, job, resume=path)
        if resumed is None:
            return
        steps = min(steps for kind, steps in resumed[0].shards if kind == "weights")
        loaded: Found = compared_loads(saved, resumed, steps)
        if loaded.worst is not None:
            self._rows.append(Row(name, "loaded bits", loaded.compared, loaded.worst, loaded.first))

    def _note_differences_of_setting(self) -> None:
        for option, value in self._jobs[0].lifted.items():
            self.notes.append(f"{option}={value} was lifted: it rounds more coarsely than what is compared")
        self.notes.append(
            f"optimizers had eps of at least {LEAST_EPS:g} and a learning rate of at least {LEAST_RATE:g}; random "
            "draws, as of dropout, were the same in both"
        )
        if len(self._base.batches) < 4 * self.window:
            self.notes.append(f"{len(self._base.batches)} batches were given, and {4 * self.window} used: they repeat")
        if not self._of_reference[0].evaluations:
            self.notes.append("evaluation was not compared: there is no validation_step")
        if not self._is_alone:
            self.notes.append("resuming on another number of ranks was not compared: what a rank sees would change")


def with_ranks(job: ScaledJob, ranks: int) -> ScaledJob:
    """The job on another number of ranks, all in one partition group.

    Args:
        job: The job.
        ranks: Number of ranks.
    """
    topology = replace(job.topology, world_size=ranks, ranks_per_node=1, partition_size=ranks)
    return replace(job, topology=topology, options={**job.options, "ranks_per_node": 1, "partition_size": ranks})


def _most_telling(failed: Sequence[Answer[Any]]) -> Answer[Any]:
    """The error that says most: not that another rank has gone."""
    for_other = ("no answer within", "Connection", "peer")
    dead = [answer for answer in failed if answer.died]
    own = dead or [answer for answer in failed if not any(word in answer.error for word in for_other)]
    return (own or list(failed))[0]
