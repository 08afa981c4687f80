"""A Trainer resumes from the memory of its nodes: the same bits, at most one step lost, never anew without a word."""

from __future__ import annotations

import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import MiCSFabricStrategy, MiCSStrategy, ResumableSampler, full_state_dict
from lightning_mics.in_memory import job
from lightning_mics.in_memory.keeper.client import KeeperConnection
from lightning_mics.in_memory.saver import StepSaver
from lightning_mics.integrations._in_memory import UnfitRanksError, fits_the_ranks
from lightning_mics.integrations._keeper import keeper_settings, launcher_process
from lightning_mics.topology import Topology
from tests.support.models import TinyModule, tokens
from tests.support.quantizing import WideLM, quantizing, uncompiled
from tests.support.trainers import make_trainer, mics, on_ranks

STEPS = 8


class DiesError(RuntimeError):
    """What ends a run."""


class Mortal(TinyModule):
    """Draws a random number for each loss, and raises at a step.

    Args:
        dies_at: Number of optimizer steps done.
        rescales: Whether a hook changes the weights before each batch.
    """

    def __init__(self, *, dies_at: int | None = None, rescales: bool = False) -> None:
        super().__init__()
        self.dies_at, self.rescales = dies_at, rescales
        self.losses: list[tuple[int, str]] = []
        self.started_at = 0

    def on_train_start(self) -> None:
        self.started_at = self.global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.rescales and self.global_step:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(0.999)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.dies_at:
            raise DiesError
        loss = super().training_step(batch, batch_idx) + torch.rand(())
        self.losses.append((self.global_step, loss.item().hex()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MortalWide(Mortal):
    """The same with an optimizer of torchao, and matrices that are large enough for it to quantize their states."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = WideLM()

    def configure_optimizers(self) -> Any:
        return quantizing(self, "AdamW8bit")


def loader(global_batch_size: int) -> StatefulDataLoader[Tensor]:
    """Batches of two for each rank, from where a checkpoint was saved."""
    data: Any = tokens(96)
    sampler = ResumableSampler(data, global_batch_size=global_batch_size)
    return StatefulDataLoader(data, batch_size=2, sampler=sampler)


def fit(
    folder: Path,
    *,
    make: Callable[..., Mortal] = Mortal,
    every: int | None = 1,
    dies_at: int | None = None,
    rescales: bool = False,
    devices: int = 4,
    steps: int = STEPS,
    ckpt_path: str | None = None,
    saves_at: int | None = None,
    accumulate: int = 1,
    averages: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What one rank saw of a run: losses by step, the step it began at, weights at the end, warnings and the error."""
    callbacks: list[Any] = (
        [ModelCheckpoint(folder, every_n_train_steps=saves_at, save_last=True, save_top_k=-1)] if saves_at else []
    )
    validation: dict[str, Any] = {}
    if averages:  # exchanged with the weights around a validation after every second step
        callbacks.append(EMAWeightAveraging(decay=0.9))
        validation = {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    model = make(dies_at=dies_at, rescales=rescales)
    trainer = make_trainer(
        folder,
        strategy=mics(in_memory_checkpoint=every, **options),
        devices=devices,
        max_steps=steps,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        enable_checkpointing=bool(saves_at),
        **validation,
    )
    pl.seed_everything(1, verbose=False)
    error, comes_again = "", False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            validated = loader(2 * devices) if averages else None
            trainer.fit(model, loader(2 * devices * accumulate), validated, ckpt_path=ckpt_path)
        except Exception as raised:
            error, comes_again = f"{type(raised).__name__}: {raised}", getattr(raised, "comes_again", False)
    weights = {} if error else {name: value.cpu() for name, value in full_state_dict(model).items()}  # on rank 0
    return {
        "losses": model.losses,
        "started_at": model.started_at,
        "weights": weights,
        "warnings": [str(warning.message) for warning in caught],
        "error": error,
        "comes_again": comes_again,
    }


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """A job of its own, whose keeper is ended afterwards."""
    token = secrets.token_hex(8)
    monkeypatch.setenv("MICS_KEEPER_TOKEN", token)
    return token


@pytest.fixture
def keepers_end(token: str) -> Any:
    """End the keeper of a job that did not end by itself."""
    yield
    with_token = keeper_settings({"MICS_KEEPER_TOKEN": token}, nodes=1)
    KeeperConnection.local(with_token).ask({"do": "stop"})


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = one["weights"].keys() | other["weights"].keys()
    return bool(names) and all(torch.equal(one["weights"][name], other["weights"][name]) for name in names)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_restarted_run_has_the_same_losses_and_weights(token: str, kind: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"state_dict_type": kind}
    calm = on_ranks(partial(fit, tmp_path, every=None, **options))
    died = on_ranks(partial(fit, tmp_path, dies_at=5, **options))
    again = on_ranks(partial(fit, tmp_path, **options))
    for before, first, second in zip(calm, died, again, strict=True):
        assert first["error"].startswith("DiesError")
        assert second["started_at"] in (4, 5)
        assert dict(first["losses"] + second["losses"]) == dict(before["losses"])
        assert all(loss in before["losses"] for loss in first["losses"] + second["losses"])
    assert same_weights(calm[0], again[0])
    with pytest.raises(ConnectionRefusedError):  # the keeper has ended with the job
        KeeperConnection.local(keeper_settings({"MICS_KEEPER_TOKEN": token}, nodes=1))


@pytest.mark.usefixtures("token")
def test_averages_that_are_exchanged_around_a_validation_cost_no_step(tmp_path: Path) -> None:
    calm = on_ranks(partial(fit, tmp_path, every=None, averages=True))
    died = on_ranks(partial(fit, tmp_path, dies_at=5, averages=True))
    again = on_ranks(partial(fit, tmp_path, averages=True))
    for before, first, second in zip(calm, died, again, strict=True):
        assert first["error"].startswith("DiesError")
        assert second["started_at"] in (4, 5)
        assert not any("dropped" in warning for warning in first["warnings"] + second["warnings"])
        assert dict(first["losses"] + second["losses"]) == dict(before["losses"])
    assert same_weights(calm[0], again[0])  # after a fit the model is the average


def fit_wide(folder: Path, **options: Any) -> dict[str, Any]:
    with uncompiled():
        return fit(folder, make=MortalWide, steps=4, **options)


@pytest.mark.usefixtures("token")
def test_quantized_states_are_in_memory_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    calm = on_ranks(partial(fit_wide, tmp_path, every=None))
    on_ranks(partial(fit_wide, tmp_path, dies_at=3))
    again = on_ranks(partial(fit_wide, tmp_path))
    assert {found["started_at"] for found in again} <= {2, 3}
    assert [found["losses"][-1] for found in again] == [found["losses"][-1] for found in calm]
    assert same_weights(calm[0], again[0])


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("offload", [True, "optimizer"])
def test_model_states_in_host_memory_come_back_too(offload: Any, tmp_path: Path) -> None:
    calm = on_ranks(partial(fit, tmp_path, every=None))
    on_ranks(partial(fit, tmp_path, dies_at=5, offload=offload))
    again = on_ranks(partial(fit, tmp_path, offload=offload))
    assert {found["started_at"] for found in again} <= {4, 5}
    assert same_weights(calm[0], again[0])


@pytest.mark.usefixtures("token")
def test_weights_that_a_hook_changes_between_steps_are_not_saved_torn(tmp_path: Path) -> None:
    calm = on_ranks(partial(fit, tmp_path, every=None, rescales=True))
    died = on_ranks(partial(fit, tmp_path, dies_at=6, rescales=True))
    again = on_ranks(partial(fit, tmp_path, rescales=True))
    assert any("a sharded tensor was changed between two steps" in text for text in died[0]["warnings"])
    assert {found["started_at"] for found in again} <= {4, 5, 6}
    assert [found["losses"][-1] for found in again] == [found["losses"][-1] for found in calm]
    assert same_weights(calm[0], again[0])


@pytest.mark.usefixtures("token")
def test_a_step_in_memory_takes_precedence_over_an_older_checkpoint(tmp_path: Path) -> None:
    on_ranks(partial(fit, tmp_path, dies_at=6, saves_at=2))
    (given,) = {str(path) for path in tmp_path.glob("*step=4*")}
    again = on_ranks(partial(fit, tmp_path, ckpt_path=given))
    assert {found["started_at"] for found in again} <= {5, 6}


class Renamed(Mortal):
    """The same model with other names, as after a change of the code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.other = self.net
        del self.net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.other(batch)
        return loss


@pytest.mark.usefixtures("keepers_end")
def test_another_model_is_an_error_on_all_ranks_and_never_begins_anew(tmp_path: Path) -> None:
    on_ranks(partial(fit, tmp_path, dies_at=3))
    found = on_ranks(partial(fit, tmp_path, make=Renamed))
    assert {rank["error"] for rank in found} == {found[0]["error"]}
    expected = "CheckpointMismatchError: the checkpoint and the model differ: 14 names are missing in the checkpoint"
    assert found[0]["error"].startswith(expected)
    assert all(rank["comes_again"] for rank in found)  # so torchrun ends
    assert all(rank["losses"] == [] for rank in found)


class Watched(Mortal):
    """Notes which steps are whole when a step of the optimizer ends, and whether one is copied when one begins."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.whole: list[tuple[int, int]] = []
        self.beside: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        saving = self._saver()._saving
        self.beside.append(saving is not None and not saving.copied.is_set())
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.whole.append((self.global_step + 1, self._saver().protected_step))  # Lightning counts this step later

    def _saver(self) -> Any:
        return self.trainer.strategy._in_memory._job.saver  # type: ignore[union-attr]


def watched(folder: Path, *, every: int, accumulate: int) -> tuple[list[tuple[int, int]], list[bool]]:
    """What a rank notes of a fit whose steps are copied, and come to other nodes, more slowly than it computes."""
    copy, commit = StepSaver._copy, StepSaver._commit

    def copy_slowly(self: StepSaver, *args: Any) -> None:
        time.sleep(0.1)
        copy(self, *args)

    def commit_slowly(self: StepSaver, *args: Any) -> None:
        time.sleep(0.2)
        commit(self, *args)

    StepSaver._copy, StepSaver._commit = copy_slowly, commit_slowly  # type: ignore[method-assign]
    models: list[Watched] = []

    def make(**options: Any) -> Watched:
        models.append(Watched(**options))
        return models[0]

    found = fit(folder, make=make, every=every, accumulate=accumulate, devices=2)
    assert not found["error"]
    return models[0].whole, models[0].beside


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (1, 2), (3, 1)])
def test_a_step_that_is_saved_ends_when_the_one_before_is_whole_and_computes_beside_the_copies(
    tmp_path: Path, every: int, accumulate: int
) -> None:
    for whole, beside in on_ranks(partial(watched, tmp_path, every=every, accumulate=accumulate), world_size=2):
        assert [step for step, _ in whole] == list(range(1, STEPS + 1))
        assert all(newest >= step // every * every - every for step, newest in whole if step >= 2 * every)
        assert any(beside)
        assert accumulate == 1 or not any(beside[1::2])  # the last micro-step's time is for the way to another node


@pytest.mark.usefixtures("token")
def test_every_so_many_steps(tmp_path: Path) -> None:
    on_ranks(partial(fit, tmp_path, every=3, dies_at=5))
    assert {found["started_at"] for found in on_ranks(partial(fit, tmp_path, every=3))} == {3}


@pytest.mark.usefixtures("token")
def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    on_ranks(partial(fit, tmp_path, dies_at=5, every=4))
    expected = on_ranks(partial(fit, tmp_path, steps=4, every=None))[0]
    again = on_ranks(partial(fit, tmp_path, steps=4, devices=2, accumulate=2), world_size=2)
    assert [found["losses"] for found in again] == [[], []]  # all steps were done
    assert same_weights(expected, again[0])


@pytest.mark.usefixtures("keepers_end")
def test_a_restart_that_finds_nothing_ends_in_an_error_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    found = on_ranks(partial(fit, tmp_path))
    assert all(rank["error"].startswith("NoWholeStepError: the job was started again") for rank in found)
    assert all(rank["comes_again"] for rank in found)
    assert all(rank["losses"] == [] for rank in found)


def test_or_resumes_from_the_newest_checkpoint_on_a_disk(
    token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_ranks(partial(fit, tmp_path, every=None, dies_at=5, saves_at=2))
    with pytest.raises(ConnectionRefusedError):  # without the option there is no keeper
        KeeperConnection.local(keeper_settings({"MICS_KEEPER_TOKEN": token}, nodes=1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = on_ranks(partial(fit, tmp_path, saves_at=2))
    assert {found["started_at"] for found in again} == {4}
    assert any("no step in memory is whole, so the run resumes from" in text for text in again[0]["warnings"])


def fit_twice(folder: Path) -> list[dict[str, Any]]:
    """Two fits of a process that was restarted during the first one."""
    first = fit(folder, steps=2)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return [first, fit(folder, steps=2)]


@pytest.mark.usefixtures("token")
def test_a_second_fit_begins_though_the_first_one_was_restarted(tmp_path: Path) -> None:
    first, second = on_ranks(partial(fit_twice, tmp_path))[0]
    assert first["error"] == second["error"] == ""
    assert [step for step, _ in first["losses"]] == [step for step, _ in second["losses"]] == [0, 1]


@pytest.mark.usefixtures("keepers_end")
def test_a_host_with_too_little_memory_is_an_error_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "host_memory_bytes", lambda: 2**16)
    found = on_ranks(partial(fit, tmp_path))
    assert all("HostMemoryError: in_memory_checkpoint takes" in rank["error"] for rank in found), found[0]["error"]
    assert all("GiB may be used (75% of what the host" in rank["error"] for rank in found)
    assert [len(rank["losses"]) for rank in found] == 4 * [0]  # before the first step


def test_other_intervals_are_rejected() -> None:
    with pytest.raises(ValueError, match="in_memory_checkpoint=0 must be at least 1"):
        MiCSStrategy(in_memory_checkpoint=0)
    with pytest.raises(TypeError, match="in_memory_checkpoint must be an integer or None, got True"):
        MiCSStrategy(in_memory_checkpoint=True)
    with pytest.raises(ValueError, match="in_memory_checkpoint is for a Trainer"):
        MiCSFabricStrategy(in_memory_checkpoint=1)


def test_options_that_do_not_fit_the_ranks_that_are_left_say_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which is replaced
    error = "partition_size=4 does not divide world_size=6"
    with pytest.raises(ValueError, match=f"{error}; with 2 ranks per node use one of 1, 2, 6$"), fits_the_ranks():
        Topology(world_size=6, ranks_per_node=2, partition_size=4)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    match = f"{error}.* If nodes have died: .* keep --nnodes at one number, and start spare nodes"
    with pytest.raises(UnfitRanksError, match=match), fits_the_ranks():
        Topology(world_size=6, ranks_per_node=2, partition_size=4)


def test_the_launcher_is_torchrun_where_it_starts_ranks_again() -> None:
    assert launcher_process({}) is None
    assert launcher_process({"TORCHELASTIC_MAX_RESTARTS": "0"}) is None
    assert launcher_process({"TORCHELASTIC_MAX_RESTARTS": "3"}) == os.getppid()
    assert launcher_process({"TORCHELASTIC_MAX_RESTARTS": "3", "MICS_LAUNCHER_PROCESS": "7"}) == 7  # of a warm rank


def test_several_nodes_need_a_token_and_an_interface() -> None:
    with pytest.raises(ValueError, match=r"export MICS_KEEPER_TOKEN=\$\(openssl rand -hex 32\)"):
        keeper_settings({}, nodes=2)
    with pytest.raises(ValueError, match="set MICS_KEEPER_INTERFACE to the interface between nodes"):
        keeper_settings({"MICS_KEEPER_TOKEN": "x", "MASTER_ADDR": "127.0.0.1"}, nodes=2)
    with pytest.raises(ValueError, match="the interface 'none' has no address"):
        keeper_settings({"MICS_KEEPER_TOKEN": "x", "MICS_KEEPER_INTERFACE": "none"}, nodes=2)
    assert keeper_settings({"MICS_KEEPER_TOKEN": "x", "MICS_KEEPER_INTERFACE": "lo"}, nodes=2).host == "127.0.0.1"


def test_starts_of_one_job_have_one_keeper_and_jobs_have_their_own() -> None:
    one = keeper_settings({"MICS_KEEPER_TOKEN": "x"}, nodes=1)
    assert one.name == keeper_settings({"MICS_KEEPER_TOKEN": "x"}, nodes=1).name
    assert one.name != keeper_settings({"MICS_KEEPER_TOKEN": "y"}, nodes=1).name
    assert keeper_settings({}, nodes=1).name == keeper_settings({}, nodes=1).name  # of one launcher
