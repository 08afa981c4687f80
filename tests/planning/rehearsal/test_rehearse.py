"""A rehearsal is true: real ranks run the same collectives in the same order, and allocate as much."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from lightning_mics import MiCSStrategy
from lightning_mics.cost.collective import Collective
from lightning_mics.planning.rehearsal.collectives import Collectives
from lightning_mics.planning.rehearsal.observed import Observed
from lightning_mics.sharding.shard_model import mixed_precision_policy, shard_model
from recipes.plan.dry_run import Training
from tests.support import jobs
from tests.support.campaign import campaign
from tests.support.forked import run_ranks
from tests.support.groups import groups_for
from tests.support.jobs import JOBS, LENGTH, MODELS, SEQUENCES, Job, language_model, rehearsed_job
from tests.support.trainers import make_trainer, on_ranks

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(900)]  # a fixture runs all real jobs of as many ranks


Case = tuple[str, str]  # a model and a job


OF_BERT = ("a node a group", "once per step", "recomputed", "mixed precision")


CASES: list[Case] = [(name, job) for name in MODELS for job in JOBS]


def is_left_to_the_campaign(name: str, job: str) -> bool:
    """Jobs differ in sharding, models in their layers: one model has one job of each kind, the other has the rest."""
    return (name == "bert") != (job in OF_BERT)


def cases_of(in_campaign: bool) -> list[Case]:
    return [case for case in CASES if in_campaign or not is_left_to_the_campaign(*case)]


def marked(cases: list[Case]) -> list[Any]:
    return [campaign(*case) if is_left_to_the_campaign(*case) else case for case in cases]


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Communicates as little as the other, and takes a hundredth of its time on the shards of a first step."""
    return torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)


class RealJob:
    """The same job with ranks that exist; its first step has one micro-step, in which everything is seen once."""

    def __init__(
        self, name: str, job: Job, *, micro_steps: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> None:
        self.topology, communication = job.topology, job.communication
        groups = groups_for(self.topology, communication)
        language = language_model(name)
        model = Training(language).to(torch.bfloat16 if job.precision == "bf16-true" else torch.float32)
        self.schedule = shard_model(
            model,
            groups,
            communication=communication,
            mixed_precision=mixed_precision_policy(job.precision, reduce_dtype=job.reduce_dtype),
            activation_checkpointing=job.activation_checkpointing,
        )
        self.optimizer = optimizer(model)
        self.model, self.batch = model, language.example_batch(SEQUENCES, LENGTH)
        self.micro_steps, self.mixed = micro_steps, job.precision == "bf16-mixed"
        self.optimizer_step(1)

    def optimizer_step(self, micro_steps: int | None = None) -> None:
        micro_steps = micro_steps or self.micro_steps
        for micro_step in range(micro_steps):
            with self.schedule.micro_step(boundary=micro_step == micro_steps - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
                    value = self.model(self.batch)
                if micro_step == 0:
                    self.optimizer.zero_grad()
                value.backward()
                del value
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def rank_to_rehearse(job: str) -> int:
    """The first of the job or the last."""
    world_size = JOBS[job].topology.world_size
    return (world_size - 1) * (list(JOBS).index(job) % 2)


def is_watched(job: str) -> bool:
    """Whether this rank is the one of the job that is rehearsed."""
    return dist.get_rank() == rank_to_rehearse(job)


def real_collectives(name: str, job_name: str) -> list[Collective]:
    job = RealJob(name, JOBS[job_name], micro_steps=3, optimizer=sgd)
    seen: list[Collective] = []
    watch = Observed(Collectives(job.topology, gloo=True, seen=lambda collective, _: seen.append(collective)))
    with watch if is_watched(job_name) else nullcontext():
        job.optimizer_step()
    return seen


def all_real_collectives(cases: list[Case]) -> dict[Case, list[Collective]]:
    return {(name, job): real_collectives(name, job) for name, job in cases}


def make_models_once() -> None:
    """Compose the configs and import what the models need before ranks are forked, each of which would do it again."""
    for name in MODELS:
        language_model(name)


@pytest.fixture(scope="module")
def real(in_campaign: bool) -> dict[Case, list[Collective]]:
    """What the rehearsed rank has run in each job; one set of processes for all jobs of as many ranks."""
    watched: dict[Case, list[Collective]] = {}
    make_models_once()
    for world_size in (4, 8):
        cases = [case for case in cases_of(in_campaign) if JOBS[case[1]].topology.world_size == world_size]
        by_rank = run_ranks(world_size, all_real_collectives, cases, timeout=400)
        watched |= {case: by_rank[rank_to_rehearse(case[1])][case] for case in cases}
    return watched


@pytest.mark.parametrize(("name", "job"), marked(CASES))
def test_real_ranks_run_the_same_collectives_in_the_same_order(
    name: str, job: str, real: dict[Case, list[Collective]]
) -> None:
    played = [ran.collective for ran in rehearsed_job(name, job, rank_to_rehearse(job)).ran]
    assert played == real[name, job]
    assert len(played) >= 3  # two blocks and the root


class Patience:
    """Waits until gloo's thread has let go of the buffers of the last collective, which it does a moment after it."""

    def __init__(self) -> None:
        self._communicated = False

    def before(self, operation: Any, args: tuple[Any, ...]) -> None:
        if self._communicated:
            time.sleep(0.02)
        self._communicated = "c10d" in operation.namespace

    def after(self, operation: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        pass


def real_peak_bytes(name: str, facts: Job) -> int:
    """The most that the allocator has given out in a step after the first, without the buffers that gloo makes itself.

    The smaller peak of two steps: on a busy machine gloo may let go of what it has sent later than FSDP2 does.
    """
    gc.collect()  # what an earlier job has left
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, Observed(Patience()):
        job = RealJob(name, facts, micro_steps=3, optimizer=fused_adamw)
        for _ in range(2):
            with record_function("measured step"):
                job.optimizer_step()
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    events = sorted(_all(tree), key=lambda event: event.start_time_ns)
    begins = [event.start_time_ns for event in events if event.name == "measured step"]
    gloos: set[int] = set()
    live, peaks = 0, [0, 0]
    for event in events:
        if event.tag != _EventType.Allocation:
            continue
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0 and _in_gloo(event):
            gloos.add(pointer)
        elif size > 0 or pointer not in gloos:
            live += size
        else:
            gloos.remove(pointer)
        step = sum(event.start_time_ns >= begin for begin in begins)
        if step:
            peaks[step - 1] = max(peaks[step - 1], live)
    return min(peaks)


def _all(events: Any) -> Any:
    for event in events:
        yield event
        yield from _all(event.children)


def _in_gloo(event: Any) -> bool:
    while event is not None and not event.name.startswith(("c10d::", "gloo:")):
        event = event.parent
    return event is not None


MEASURED = [case for case in CASES if case[1] in (*OF_BERT, "one rank a group", "flat over nodes")]
MEASURED_ALWAYS = {  # nothing gathered, cached, recomputed, in two dtypes
    ("gpt", "one rank a group"),
    ("gpt", "once per step"),
    ("gpt", "recomputed"),
    ("bert", "mixed precision"),
}


def runs_beside(name: str, facts: Job) -> None:
    """The steps of a rank whose allocations nobody counts."""
    job = RealJob(name, facts, micro_steps=3, optimizer=fused_adamw)
    for _ in range(2):
        job.optimizer_step()


def all_real_peaks(cases: list[Case]) -> dict[Case, int | None]:
    return {(name, job): (real_peak_bytes if is_watched(job) else runs_beside)(name, JOBS[job]) for name, job in cases}


@pytest.fixture(scope="module")
def real_peaks(in_campaign: bool) -> list[dict[Case, int | None]]:
    """What each of four ranks has allocated in each job in which it is rehearsed."""
    make_models_once()
    return run_ranks(4, all_real_peaks, MEASURED if in_campaign else sorted(MEASURED_ALWAYS), timeout=400)


@pytest.mark.parametrize(("name", "job"), [case if case in MEASURED_ALWAYS else campaign(*case) for case in MEASURED])
def test_real_ranks_allocate_as_much(name: str, job: str, real_peaks: list[dict[Case, int | None]]) -> None:
    rank = rank_to_rehearse(job)
    assert rehearsed_job(name, job, rank).peak_bytes == pytest.approx(real_peaks[rank][name, job], rel=0.02)


class Watched(pl.Callback):
    """Notes what the second optimizer step runs on the groups of the strategy."""

    def __init__(self) -> None:
        self.seen: list[Collective] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        def seen(collective: Collective, _: Any) -> None:
            if trainer.global_step == 1 and collective.group in ("partition", "replication", "rail", "node"):
                self.seen.append(collective)

        self._watch = Observed(Collectives(trainer.strategy.topology, gloo=True, seen=seen))
        self._watch.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)


def under_the_trainer(name: str, job: Job, folder: Path) -> list[Collective]:
    model, watched = language_model(name), Watched()
    trainer = make_trainer(
        folder,
        strategy=MiCSStrategy(
            ranks_per_node=2,
            partition_size=job.topology.partition_size,
            activation_checkpointing=job.activation_checkpointing,
            **job.communication.keywords(),
        ),
        max_steps=2,
        accumulate_grad_batches=3,
        gradient_clip_val=1.0,
        callbacks=[watched],
        use_distributed_sampler=False,
    )
    batches = DataLoader([model.example_batch(SEQUENCES, LENGTH)] * 6, batch_size=None)
    trainer.fit(model, batches)
    return watched.seen


UNDER_THE_TRAINER: list[Case] = [("gpt", "once per step"), ("bert", "recomputed"), ("bert", "a node a group")]
UNDER_THE_TRAINER_ALWAYS = UNDER_THE_TRAINER[:2]


def all_under_the_trainer(folder: Path, cases: list[Case]) -> dict[Case, list[Collective]]:
    return {(name, job): under_the_trainer(name, JOBS[job], folder) for name, job in cases}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> list[dict[Case, list[Collective]]]:
    make_models_once()
    cases = UNDER_THE_TRAINER if in_campaign else UNDER_THE_TRAINER_ALWAYS
    return on_ranks(all_under_the_trainer, tmp_path_factory.mktemp("trained"), cases)


@pytest.mark.parametrize(
    ("name", "job"), [case if case in UNDER_THE_TRAINER_ALWAYS else campaign(*case) for case in UNDER_THE_TRAINER]
)
def test_the_trainer_runs_them_too(name: str, job: str, trained: list[dict[Case, list[Collective]]]) -> None:
    rank = rank_to_rehearse(job)
    assert [ran.collective for ran in rehearsed_job(name, job, rank).ran] == trained[rank][name, job]


def test_nothing_is_left_of_a_model_that_was_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    def made(network: Any) -> Training:
        model = Training(network)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(jobs, "Training", made)
    jobs.rehearsed("bert", JOBS["once per step"])
    gc.collect()
    assert [model() for model in models] == [None]
