"""A signal to any rank, at any moment: all ranks save after the same optimizer step, stop, and go on from there."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_mics import CommunicationOptions
from lightning_mics.collectives.control_plane import ControlPlane
from lightning_mics.integrations.trainer import preemption
from lightning_mics.integrations.trainer.preemption import Request, StopTogether
from tests.support.campaign import campaign
from tests.support.models import TinyModule, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics, on_ranks

RANKS = 4


BATCHES = 6  # of each rank and epoch


EPOCHS = 2


class Batches:
    """This rank's batches of an epoch; a checkpoint holds how many have been taken."""

    def __init__(self, count: int = BATCHES) -> None:
        ranks = dist.get_world_size()
        self.all = list(tokens(2 * count * ranks, seed=3)[dist.get_rank() :: ranks].split(2))
        self.first = self.taken = 0

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Tensor]:
        self.taken, self.first = self.first, 0
        for batch in self.all[self.taken :]:
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken % len(self.all)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["taken"]


class Module(TinyModule):
    """Trained with AdamW and a rate that falls, so that a lost or a repeated step shows; records its losses."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.losses: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, foreach=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Signals(Callback):
    """Sends SIGTERM from one rank to others at a point: (hook, number of earlier calls)."""

    def __init__(self, *planned: tuple[str, int, int, tuple[int, ...]]) -> None:
        self.planned = planned
        self.visits: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.processes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self.processes, os.getpid())

    def _at(self, place: str) -> None:
        for hook, visit, sender, receivers in self.planned:
            if (hook, visit, sender) == (place, self.visits.get(place, 0), dist.get_rank()):
                for receiver in receivers:
                    os.kill(self.processes[receiver], signal.SIGTERM)
        self.visits[place] = self.visits.get(place, 0) + 1

    def on_train_batch_start(self, *_: Any) -> None:
        self._at("micro-step")

    def on_after_backward(self, *_: Any) -> None:
        self._at("backward")

    def on_train_batch_end(self, *_: Any) -> None:
        self._at("micro-step's end")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("sanity check" if trainer.sanity_checking else "validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        self._at("saving")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._at("epoch's end")


def run(folder: Path, *callbacks: Callback, options: dict[str, Any], **fit: Any) -> dict[str, Any]:
    """Fit until the end or until a signal; what became of it on this rank."""
    torch.manual_seed(0 if not fit else 1)  # what a checkpoint restores must differ before
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_epochs=EPOCHS)
    trainer = make_trainer(
        folder,
        **{"strategy": mics(), **options},
        devices=dist.get_world_size(),
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=[saving, *callbacks],
    )
    module, stopped = Module(), "no"
    try:
        trainer.fit(module, Batches(), Batches(3), **fit)
    except SIGTERMException as stop:
        stopped = f"with code {stop.code}"
    return {
        "losses": module.losses,
        "validated": module.validated,
        "step": trainer.global_step,
        "stopped": stopped,
        "received_sigterm": trainer.received_sigterm,
        "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    }


def preempted_and_resumed(folder: Path, cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By case what became of a run that is stopped, of its second part, and of one with these options that is not."""
    undisturbed: dict[str, dict[str, Any]] = {}
    return {case: _preempted_and_resumed(folder / case, undisturbed, *each[:2]) for case, each in cases.items()}


def _preempted_and_resumed(
    folder: Path, undisturbed: dict[str, dict[str, Any]], planned: list[Any], options: dict[str, Any]
) -> dict[str, Any]:
    if repr(options) not in undisturbed:
        undisturbed[repr(options)] = run(folder / "whole", options=_strategy(options))
    first = run(folder / "in_parts", Signals(*planned), options=_strategy(options))
    dist.barrier()
    saved = sorted(path.name for path in (folder / "in_parts" / "checkpoints").glob("*"))
    dist.barrier()
    second = run(folder / "in_parts", options=_strategy(options), ckpt_path="last")
    return {"whole": undisturbed[repr(options)], "first": first, "saved": saved, "second": second}


def _strategy(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "strategy": mics(**options.get("strategy", {}))}


def everyone(place: str, visit: int) -> list[Any]:
    return [(place, visit, rank, (rank,)) for rank in range(RANKS)]


WINDOW = {"accumulate_grad_batches": 3}


VALIDATING = {"limit_val_batches": 1.0}


# planned signals (hook, earlier calls, sender, receivers), options of the Trainer, micro-steps until the stop
CASES: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "to another, where sharding always communicates": (
        [("micro-step", 2, 0, (3,))],
        {"strategy": CommunicationOptions.PAPER.keywords()},
        4,
    ),
    "in the middle of a window, to all": (everyone("micro-step's end", 1), WINDOW, 6),
    "at an epoch's end": ([("epoch's end", 0, 1, (1,))], {}, 8),
    # in the second micro-step of a window: all have begun the comparison that follows the window before
    "at different steps of different ranks": ([("micro-step", 4, 0, (1,)), ("micro-step", 5, 1, (0,))], WINDOW, 9),
    "again while it is saved": ([("micro-step", 2, 1, (1,)), *everyone("saving", 0)], {}, 4),
    "in a validation inside a window": (
        [("validation", 1, 1, (0,))],
        {**VALIDATING, **WINDOW, "val_check_interval": 2},
        6,
    ),
}


ON_FOUR = ["to another, where sharding always communicates"]  # ranks; others of these cases are about two


IN_CAMPAIGN: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "to itself": ([("micro-step", 2, 1, (1,))], {}, 4),
    "to all at once": (everyone("micro-step", 2), {}, 4),
    "in a validation": ([("validation", 1, 2, (2,))], VALIDATING, 6),
    "to rank 0": ([("micro-step", 2, 0, (0,))], {}, 4),
    "to all from one, wherever they wait": ([("backward", 2, 2, (0, 1, 2, 3))], {}, 4),
    "in the first micro-step of a window": ([("micro-step", 3, 3, (3,))], WINDOW, 9),
    "in the last micro-step of an epoch": ([("micro-step", 5, 1, (1,))], {}, 7),
    "before a validation": ([("micro-step", 5, 1, (1,))], VALIDATING, 6),
    "in a validation inside an epoch": ([("validation", 1, 2, (0,))], {**VALIDATING, "val_check_interval": 2}, 2),
    "in the last batch of a validation": ([("validation", 2, 2, (2,))], VALIDATING, 6),
}


@pytest.fixture(scope="module")
def preempted(tmp_path_factory: pytest.TempPathFactory, in_campaign: bool) -> dict[str, list[dict[str, Any]]]:
    """By case what each rank has returned; all cases of as many ranks run in one set of processes."""
    on_four = {case: CASES[case] for case in ON_FOUR} | (IN_CAMPAIGN if in_campaign else {})
    on_two = {case: each for case, each in CASES.items() if case not in ON_FOUR}
    found = {}
    for ranks, cases in ((RANKS, on_four), (2, on_two)):
        folder = tmp_path_factory.mktemp("preempted")
        of_ranks = on_ranks(preempted_and_resumed, folder, cases, world_size=ranks, timeout=280)
        found.update({case: [of_rank[case] for of_rank in of_ranks] for case in cases})
    return found


@pytest.mark.parametrize("case", [*CASES, *map(campaign, IN_CAMPAIGN)])
def test_all_ranks_stop_after_the_same_step_and_resume_as_if_uninterrupted(
    case: str, preempted: dict[str, list[dict[str, Any]]]
) -> None:
    _, options, micro_steps = (CASES | IN_CAMPAIGN)[case]
    for rank in preempted[case]:
        whole, first, saved, second = (rank[part] for part in ("whole", "first", "saved", "second"))
        assert whole["stopped"] == second["stopped"] == "no"
        assert first["stopped"] == "with code None"  # which is exit status 0
        assert first["received_sigterm"] and first["handler"]
        assert saved == ["last.ckpt"]
        assert len(first["losses"]) == micro_steps
        assert first["step"] == micro_steps // options.get("accumulate_grad_batches", 1)
        assert first["losses"] + second["losses"] == whole["losses"]
        assert first["validated"] + second["validated"] == whole["validated"]
        assert (
            len(set(whole["losses"])) == len(whole["losses"]) == BATCHES * EPOCHS
        )  # a step that is lost or doubled would be seen


# -- what else a Trainer may be doing ---------------------------------------------------------------------------------


class Counted(ModelCheckpoint):
    """Counts what it saves."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: list[str] = []

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.saved.append(Path(filepath).name)
        super()._save_checkpoint(trainer, filepath)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, list[Any]]:
    """By case what each rank has returned; all cases run in one set of processes."""
    cases: dict[str, Callable[[Path], Any]] = {
        "saving callbacks": saving_callbacks,
        "without checkpoints": without_checkpoints,
        "evaluations": evaluations,
        "unequal validations": unequal_validations,
        "by hand": by_hand,
        "two runs": two_runs_of_one_trainer,
        "comparisons": comparisons,
        "own handler": own_handler,
    }
    for case in cases:
        (folder / case).mkdir()
    of_folders = {case: partial(function, folder / case) for case, function in cases.items()}
    return cases_on_ranks(of_folders, world_size=2, timeout=280)


def trainer_of(folder: Path, **options: Any) -> pl.Trainer:
    return make_trainer(folder, strategy=mics(), devices=2, **options)


def saving_callbacks(folder: Path) -> dict[str, list[list[str]]]:
    """What each ModelCheckpoint saves until a signal in the third step has stopped the run after the fourth."""

    def until_stopped(*options: dict[str, Any]) -> list[list[str]]:
        callbacks = [Counted(dirpath=folder / str(len(found)) / str(i), **each) for i, each in enumerate(options)]
        signals = Signals(("micro-step", 2, 1, (1,)))
        trainer = trainer_of(folder, callbacks=[signals, *callbacks], enable_checkpointing=True)
        with pytest.raises(SIGTERMException):
            trainer.fit(Module(), Batches())
        return [callback.saved for callback in callbacks]

    found: dict[str, list[list[str]]] = {}
    found["no last"] = until_stopped({})
    found["last of this step"] = until_stopped({"save_last": True, "every_n_train_steps": 1, "filename": "{step}"})
    found["a link"] = until_stopped({"save_last": "link", "every_n_train_steps": 3, "filename": "{step}"})
    found["two, and the first keeps weights only"] = until_stopped(
        {"save_weights_only": True, "every_n_epochs": 2}, {}, {"every_n_epochs": 3}
    )
    found["on exceptions as well"] = until_stopped({"save_on_exception": True})
    return found


def test_the_first_model_checkpoint_that_saves_more_than_weights_saves_last_once(
    folder: Path, seen: dict[str, list[Any]]
) -> None:
    for saved in seen["saving callbacks"]:
        assert saved == {
            "no last": [["last.ckpt"]],
            "last of this step": [[name for step in (1, 2, 3, 4) for name in (f"step={step}.ckpt", "last.ckpt")]],
            "a link": [["step=3.ckpt", "last.ckpt"]],
            "two, and the first keeps weights only": [[], ["last.ckpt"], []],
            "on exceptions as well": [["last.ckpt"]],
        }
    assert (folder / "saving callbacks" / "2" / "0" / "last.ckpt" / "manifest.json").exists()


def without_checkpoints(folder: Path) -> list[str]:
    trainer = trainer_of(folder, callbacks=[Signals(("micro-step", 2, 1, (1,)))])
    with warnings.catch_warnings(record=True, action="always") as warned, pytest.raises(SIGTERMException):
        trainer.fit(Module(), Batches())
    assert trainer.global_step == 4
    return [str(warning.message) for warning in warned if "Stopped by a signal" in str(warning.message)]


def test_without_a_model_checkpoint_nothing_is_saved_and_rank_0_warns(folder: Path, seen: dict[str, list[Any]]) -> None:
    assert seen["without checkpoints"] == [
        [
            "Stopped by a signal after step 4 without a checkpoint: no ModelCheckpoint of this Trainer saves complete "
            "ones; add one to `callbacks`, with save_weights_only=False"
        ],
        [],
    ]
    assert not list((folder / "without checkpoints").iterdir())


class Evaluations(Signals):
    """Counts the batches of evaluations, and is signaled in the second."""

    def __init__(self) -> None:
        super().__init__(("evaluation", 1, 1, (1,)))

    def on_validation_batch_start(self, *_: Any) -> None:
        self._at("evaluation")

    def on_test_batch_start(self, *_: Any) -> None:
        self._at("evaluation")

    def on_predict_batch_start(self, *_: Any) -> None:
        self._at("evaluation")


def evaluations(folder: Path) -> dict[str, tuple[str, int]]:
    """What became of evaluations of six batches, or three, in which ranks compare after every second one."""
    found = {}
    for method in ("validate", "test", "predict", "fit"):  # fit: in the check before the first step
        counting = Evaluations()
        trainer = trainer_of(folder, callbacks=[counting], num_sanity_val_steps=3)
        try:
            with patch.object(preemption, "MOST_BATCHES", 2), patch.object(preemption, "APART", 10**6):
                getattr(trainer, method)(Module(), *[Batches()] * (2 if method == "fit" else 1))
            stopped = "no"
        except SIGTERMException:
            stopped = "yes"
        found[method] = (stopped, counting.visits["evaluation"])
    return found


def test_an_evaluation_stops_after_the_same_batch_on_all_ranks(seen: dict[str, list[Any]]) -> None:
    expected = {**dict.fromkeys(("validate", "test", "predict"), ("yes", 4)), "fit": ("yes", 3)}
    assert seen["evaluations"] == [expected] * 2


def unequal_validations(folder: Path) -> tuple[int, int, list[str]]:
    """Ranks cache unsharded weights, so that each can validate its own number of batches."""
    signals = Signals(("validation", 0, 0, (0,)))
    saving = ModelCheckpoint(dirpath=folder, save_top_k=0)
    trainer = trainer_of(
        folder,
        callbacks=[signals, saving],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        val_check_interval=2,
    )
    with pytest.raises(SIGTERMException):
        trainer.fit(Module(), Batches(), Batches(2 + dist.get_rank()))
    return trainer.global_step, signals.visits["validation"], [path.name for path in folder.iterdir()]


def test_ranks_that_validate_different_numbers_of_batches_stop_when_all_have_finished(
    seen: dict[str, list[Any]],
) -> None:
    found = seen["unequal validations"]
    assert [(step, batches) for step, batches, _ in found] == [(2, 2 + rank) for rank in range(2)]
    assert all(saved == ["last.ckpt"] for _, _, saved in found)


class ByHand(Module):
    """Steps in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self(batch))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def by_hand(folder: Path) -> tuple[int, int]:
    signals = Signals(("micro-step", 2, 1, (1,)))
    trainer = trainer_of(folder, callbacks=[signals])
    with pytest.raises(SIGTERMException):
        trainer.fit(ByHand(), Batches())
    return trainer.global_step, signals.visits["micro-step"]


def test_manual_optimization_stops_after_a_batch_in_which_an_optimizer_stepped(seen: dict[str, list[Any]]) -> None:
    assert seen["by hand"] == [(3, 6)] * 2


def own_handler(folder: Path) -> tuple[list[int], bool, int]:
    heard: list[int] = []

    def handler(number: int, _: Any) -> None:
        heard.append(number)

    signal.signal(signal.SIGTERM, handler)
    trainer = trainer_of(folder, callbacks=[Signals(("micro-step", 2, 1, (1,)))])
    with pytest.raises(SIGTERMException):
        trainer.fit(Module(), Batches())
    return heard, signal.getsignal(signal.SIGTERM) is handler, trainer.global_step


def test_an_earlier_handler_is_called_as_well_and_restored(seen: dict[str, list[Any]]) -> None:
    found = seen["own handler"]
    assert [heard for heard, _, _ in found] == [[], [signal.SIGTERM]]
    assert all(restored and step == 4 for _, restored, step in found)


def two_runs_of_one_trainer(folder: Path) -> tuple[int, int, int]:
    callbacks = [Signals(("micro-step", 2, 1, (1,)))]
    trainer = trainer_of(folder, callbacks=callbacks)
    module = Module()
    with pytest.raises(SIGTERMException):
        trainer.fit(module, Batches())
    stopped = trainer.global_step
    trainer.fit(module, Batches())
    return stopped, trainer.global_step, len(callbacks)


def test_a_trainer_that_has_stopped_can_run_again(seen: dict[str, list[Any]]) -> None:
    assert seen["two runs"] == [(4, 4 + BATCHES, 1)] * 2


def comparisons(folder: Path) -> list[int]:
    counts = []
    for window in (1, 3):
        trainer = trainer_of(folder, accumulate_grad_batches=window)
        begin = ControlPlane.begin_largest
        with patch.object(ControlPlane, "begin_largest", autospec=True, side_effect=begin) as begun:
            trainer.fit(Module(), Batches())
        compared = [call.args[1] for call in begun.call_args_list if call.args[2] == "compares signals"]
        assert all(tensor.numel() == 2 for tensor in compared)
        counts.append(len(compared))
    return counts


def test_ranks_compare_signals_once_per_optimizer_step_and_at_the_end(seen: dict[str, list[Any]]) -> None:
    assert seen["comparisons"] == [[BATCHES + 1, BATCHES // 3 + 1]] * 2


# -- when they compare ------------------------------------------------------------------------------------------------


class OneRank:
    """Runs the hooks of StopTogether as a Trainer does, and lists when comparisons begin and are waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.recorder: Any = SimpleNamespace(request=Request.NOTHING)
        self.trainer: Any = SimpleNamespace(global_step=0, num_test_batches=[100], state=SimpleNamespace(fn="test"))
        self.callback = StopTogether(self.recorder, begin_max=self.begin, wait_for_checkpoints=lambda: None)
        self.count = 0

    def begin(self, note: Tensor, words: str) -> Callable[[], Tensor]:
        if words != "compares signals":
            return lambda: note
        self.count += 1
        name = str(self.count)
        self.events.append(f"begin {name}")

        def result() -> Tensor:
            self.events.append(f"wait {name}")
            return note

        return result


def test_no_step_waits_for_the_comparison_that_it_begins() -> None:
    rank = OneRank()
    with patch.object(preemption, "validation_follows", lambda trainer: False):
        for _ in range(3):
            rank.trainer.global_step += 1
            rank.events.append("step")
            rank.callback.on_train_batch_end(rank.trainer, None, None, 0)
        rank.callback.on_train_end(rank.trainer, None)  # type: ignore[arg-type]
    steps = ["step", "begin 1", "step", "wait 1", "begin 2", "step", "wait 2", "begin 3"]
    assert rank.events == [*steps, "wait 3", "begin 4", "wait 4"]


@pytest.mark.parametrize(("seconds", "compared_after"), [(0.01, [1, 17, 33]), (0.4, [1, 3, 5]), (20.0, [1, 3, 5])])
def test_an_evaluation_compares_about_once_a_second_and_reads_after_the_next_batch(
    seconds: float, compared_after: list[int]
) -> None:
    rank, clock = OneRank(), [100.0]
    begun = []
    with patch.object(preemption.time, "monotonic", lambda: clock[0]):
        rank.callback.on_test_start(rank.trainer, None)  # type: ignore[arg-type]
        for batch in range(1, 36):
            clock[0] += seconds
            rank.callback.on_test_batch_end(rank.trainer, None, None, None, batch)
            begun += [batch] if rank.events[-1].startswith("begin") and len(rank.events) % 2 else []
    assert list(dict.fromkeys(begun))[: len(compared_after)] == compared_after
    assert (
        rank.events
        == [f"{what} {n}" for n in range(1, rank.count + 1) for what in ("begin", "wait")][: len(rank.events)]
    )
