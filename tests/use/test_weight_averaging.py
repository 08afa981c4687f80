"""Lightning's callbacks that average weights, unchanged: the same averages as in one process, and nothing sent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_mics import CommunicationOptions
from lightning_mics.checkpoint.inspect import describe
from lightning_mics.checkpoint.opening import open_checkpoint
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.whole_model import read_tensors, stored_current_model, stored_model
from lightning_mics.integrations.trainer.callbacks import number_of_averages
from tests.support.campaign import campaign
from tests.support.fits import refusal, same, whole_weights
from tests.support.models import TinyModule, tokens
from tests.support.recorded import RecordCollectives
from tests.support.trainers import cases_on_ranks, make_trainer, mics

STEPS, MICRO_STEPS, SAVED_AFTER = 52, 2, 24
EPOCHS = 13
PER_BATCH = 8  # sequences of all ranks together

LAYOUTS: dict[str, dict[str, Any]] = {
    "p=1": {"partition_size": 1},
    "p=2": {"partition_size": 2},
    "p=4": {"partition_size": 4},
    "p=4, node": {"partition_size": 4, **CommunicationOptions.NODE.keywords()},
    "p=4, rank": {"partition_size": 4, "cache_parameters": "rank", "accumulate_gradients": "rank"},
}


class Averaged(TinyModule):
    """Tied weights, uneven shapes, a frozen parameter, few rows, and a buffer that changes in each micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.norm.bias.requires_grad_(False)
        self.narrow = nn.Parameter(torch.randn(2, 8))  # sharded by columns over four ranks
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx) + self.narrow.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Watched(Callback):
    """What a run did: validation losses, weights after each step, and collectives in the average's own hooks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}
        self.saves: Path | None = None

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == STEPS:
            self.weights = whole_weights(pl_module)
        if self.saves is not None and trainer.global_step == SAVED_AFTER and trainer.fit_loop.batch_idx % 2:
            trainer.save_checkpoint(self.saves)


class CountingEMA(EMAWeightAveraging):
    """Lightning's callback with a count around its hooks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(decay=0.9, **options)
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self._counting(super().on_train_batch_end, *args)

    def on_validation_epoch_start(self, *args: Any) -> None:
        self._counting(super().on_validation_epoch_start, *args)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self._counting(super().on_validation_epoch_end, *args)

    def on_train_end(self, *args: Any) -> None:
        self._counting(super().on_train_end, *args)

    def _counting(self, hook: Callable[..., None], *args: Any) -> None:
        with RecordCollectives() as recorded:
            hook(*args)
        self.count += len(recorded.seen)


def data(batches: int, ranks: int) -> DataLoader[Any]:
    """The same sequences in each batch on any number of ranks."""
    sequences = tokens(batches * PER_BATCH, seed=3)
    sampler = DistributedSampler(sequences, ranks, dist.get_rank(), shuffle=False) if ranks > 1 else None
    return DataLoader(sequences, batch_size=PER_BATCH // ranks, sampler=sampler)


def train(
    folder: Path,
    layout: dict[str, Any] | None,
    *,
    make: Callable[[], pl.LightningModule] = Averaged,
    average: Callable[[], Callback] = CountingEMA,
    saves: Path | None = None,
    resumes: Path | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Callback, Watched]:
    """Train in this process alone, or on the ranks of the job with a layout."""
    ranks = dist.get_world_size() if layout else 1
    torch.manual_seed(0 if resumes is None else 1)
    callback, watched = average(), Watched()
    watched.saves = saves
    trainer = make_trainer(
        folder,
        devices=ranks,
        strategy=mics(**{"ranks_per_node": 2, **layout}) if layout else "auto",
        callbacks=[callback, watched],
        accumulate_grad_batches=MICRO_STEPS,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{"max_epochs": EPOCHS, **options},
    )
    trainer.fit(
        make(), data(STEPS * MICRO_STEPS // EPOCHS, ranks), data(2, ranks), ckpt_path=resumes, weights_only=False
    )
    return trainer, callback, watched


def outcome(run: tuple[pl.Trainer, Callback, Watched]) -> dict[str, Any]:
    """What is compared; every rank calls it."""
    trainer, callback, watched = run
    model = callback._average_model
    found = {
        "weights": watched.weights,
        "average": whole_weights(model.module),
        "module": whole_weights(trainer.lightning_module),  # after the fit it is the average
        "losses": watched.losses,
        "averaged": int(model.n_averaged),
        "latest": callback._latest_update_step,
        "collectives": callback.count if isinstance(callback, CountingEMA) else 0,
    }
    found["elements"] = [sum(local(p).numel() for p in m.parameters()) for m in (model, trainer.lightning_module)]
    return found


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_job(folder: Path, layout: dict[str, Any], **options: Any) -> dict[str, Any]:
    return outcome(train(folder, layout, **options))


def gap(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of weights, averages and validation losses."""
    assert found["averaged"] == expected["averaged"] and found["latest"] == expected["latest"]
    assert len(found["losses"]) == len(expected["losses"])
    gaps = [abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)]
    for kind in ("weights", "average", "module"):
        assert found[kind].keys() == expected[kind].keys()
        gaps += [float((value - expected[kind][name]).abs().max()) for name, value in found[kind].items()]
    return max(gaps)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(train(tmp_path_factory.mktemp("alone"), None))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def in_job(saved: Path) -> dict[str, list[dict[str, Any]]]:
    names = [name for name in LAYOUTS if name in ("p=2", "p=4, node")]
    return cases_on_ranks({name: partial(of_job, saved, LAYOUTS[name], saves=saved / name) for name in names})


@pytest.mark.parametrize("name", ["p=2", "p=4, node"])
def test_averages_weights_and_validation_are_those_of_one_process(
    name: str, in_job: dict[str, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    for found in in_job[name]:
        assert gap(found, alone) < 1e-6
        assert found["averaged"] == STEPS
        assert found["collectives"] == 0
        assert found["elements"][0] == found["elements"][1] < sum(v.numel() for v in alone["weights"].values())
        for kind in ("weights", "average"):
            assert all(torch.equal(value, in_job[name][0][kind][key]) for key, value in found[kind].items())
    assert len(alone["losses"]) == EPOCHS


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["p=1", "p=4", "p=4, rank"])
def test_the_same_for_other_layouts(name: str, tmp_path: Path, alone: dict[str, Any]) -> None:
    for found in cases_on_ranks({name: partial(of_job, tmp_path, LAYOUTS[name])})[name]:
        assert gap(found, alone) < 1e-6 and found["collectives"] == 0


def resumed(folder: Path, saved: Path) -> dict[str, Any]:
    found = {}
    for checkpoint in ("p=2", "p=4, node"):
        for layout in ("p=1", "p=2") if dist.get_world_size() == 2 else ("p=2", "p=4"):
            found[checkpoint, layout] = of_job(folder, LAYOUTS[layout], resumes=saved / checkpoint)
    return found


@pytest.mark.parametrize("ranks", [2, campaign(4)])
def test_resuming_goes_on_with_both(
    ranks: int,
    in_job: dict[str, list[dict[str, Any]]],
    saved: Path,
    alone: dict[str, Any],
    tmp_path: Path,
) -> None:
    for found in cases_on_ranks({"": partial(resumed, tmp_path, saved)}, world_size=ranks)[""]:
        for case in found.values():
            case["losses"] = alone["losses"][: len(alone["losses"]) - len(case["losses"])] + case["losses"]
            assert gap(case, alone) < 1e-6


# -- files, other callbacks and what is refused -----------------------------------------------------------------------


def saved_full(folder: Path, saved: Path) -> dict[str, Any]:
    return of_job(folder, {**LAYOUTS["p=2"], "state_dict_type": "full"}, saves=saved / "full.ckpt")


def test_lightning_in_one_process_goes_on_from_a_full_file(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases_on_ranks({"": partial(saved_full, tmp_path, tmp_path)})
    file = torch.load(tmp_path / "full.ckpt", weights_only=False)
    assert file["state_dict"].keys() == file["current_model_state"].keys() == alone["average"].keys()
    found = outcome(train(tmp_path, None, resumes=tmp_path / "full.ckpt"))
    found["losses"] = alone["losses"][: len(alone["losses"]) - len(found["losses"])] + found["losses"]
    assert gap(found, alone) < 1e-6


def test_a_checkpoint_shows_both_models_and_no_tensor_is_in_its_entries(
    in_job: dict[str, list[dict[str, Any]]], saved: Path
) -> None:
    rows = dict(describe(saved / "p=2"))
    assert rows["model (average)"].startswith("16 tensors") and rows["current model"].startswith("13 tensors")
    assert (saved / "p=2" / META_FILE).stat().st_size < 2**16
    opened = open_checkpoint(saved / "p=2")
    average, current = stored_model(opened), stored_current_model(opened)
    assert average.shapes.keys() == current.shapes.keys()
    one, other = (read_tensors(opened, kind, list(kind.shapes)) for kind in (average, current))
    assert not any(torch.equal(one[name], other[name]) for name in ("net.embed.weight", "seen"))
    assert float(other["seen"]) == SAVED_AFTER * MICRO_STEPS


def stochastic() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=3)


def of_swa(folder: Path, layout: dict[str, Any] | None) -> dict[str, Any]:
    trainer, callback, _ = train(folder, layout, average=stochastic)
    return {"module": whole_weights(trainer.lightning_module), "count": int(callback.n_averaged)}


def test_stochastic_averages_are_those_of_one_process(tmp_path: Path) -> None:
    expected = of_swa(tmp_path, None)
    for found in cases_on_ranks({"": partial(of_swa, tmp_path, LAYOUTS["p=4, node"])})[""]:
        assert found["count"] == expected["count"] > 5
        for name, value in found["module"].items():
            assert torch.allclose(value, expected["module"][name], atol=1e-6, rtol=0)


class Built(Averaged):
    """Builds its layers when they can be empty."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net: Any = None
        self.built = 0

    def configure_model(self) -> None:
        if self.net is None:
            made = Averaged()
            self.net, self.seen, self.narrow = made.net, made.seen, made.narrow
            self.built += 1


class WithBatchNorm(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(3)


def other_ways(folder: Path) -> dict[str, Any]:
    """What else a program does with averages."""
    said: dict[str, Any] = {}
    layout = LAYOUTS["p=2"]
    run = train(folder, layout, make=Built, average=partial(CountingEMA, device="cpu"))
    said["built"] = (run[0].lightning_module.built, outcome(run)["average"])
    (validated,) = run[0].validate(run[0].lightning_module, data(2, 4), verbose=False)
    said["validated"] = validated["val_loss"] - run[2].losses[-1]
    given = run[0].callbacks
    said["given"] = [type(callback).__name__ for callback in given]
    multi = partial(WeightAveraging, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    said["multi"] = whole_weights(train(folder, layout, average=multi)[1]._average_model.module)
    said["batch norm"] = refusal(lambda: train(folder, layout, make=WithBatchNorm, average=stochastic))
    with pytest.warns(UserWarning, match="averages weights in bfloat16") if dist.get_rank() == 0 else nullcontext():
        train(folder, layout, precision="bf16-true")
    return said


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return cases_on_ranks({"": partial(other_ways, tmp_path_factory.mktemp("others"))})[""]


def test_modules_that_are_built_late_and_other_kinds_of_averages(
    others: list[dict[str, Any]], alone: dict[str, Any], tmp_path: Path
) -> None:
    expected = outcome(train(tmp_path, None, make=Built))
    for said in others:
        built, average = said["built"]
        assert built == 1
        for found, of_one in ((average, expected), (said["multi"], alone)):
            for name, value in found.items():
                assert torch.allclose(value, of_one["average"][name], atol=1e-6, rtol=1e-6)


def test_a_trainer_keeps_its_callbacks_and_what_cannot_be_averaged_is_refused(others: list[dict[str, Any]]) -> None:
    for said in others:
        assert said["given"] == ["CountingEMA", "Watched"]
        assert abs(said["validated"]) < 1e-6  # of the average, which the module is after the fit
        assert said["batch norm"].startswith("MisconfigurationException: StochasticWeightAveraging runs another epoch")
        assert "use_buffers=True" in said["batch norm"]


class AtStart(Callback):
    """Keeps what training starts from."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (average,) = (each for each in trainer.callbacks if isinstance(each, WeightAveraging))
        self.average, self.model = whole_weights(average._average_model.module), whole_weights(pl_module)


def mixed(folder: Path, saved: Path) -> dict[str, Any]:
    """Checkpoints with an average loaded without the callback, and the reverse."""
    options: dict[str, Any] = {"devices": 4, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    plain = make_trainer(folder, strategy=mics(**LAYOUTS["p=2"]), **options)
    torch.manual_seed(0)
    plain.fit(Averaged(), data(2, 4))
    plain.save_checkpoint(folder / "plain")
    trained = whole_weights(plain.lightning_module)
    started = AtStart()
    again = make_trainer(
        folder, strategy=mics(**LAYOUTS["p=4"]), callbacks=[CountingEMA(), started], **options, max_epochs=2
    )
    torch.manual_seed(1)
    again.fit(Averaged(), data(2, 4), ckpt_path=folder / "plain", weights_only=False)
    validated = make_trainer(folder, strategy=mics(**LAYOUTS["p=4"]), **options)
    validated.validate(Averaged(), data(2, 4), ckpt_path=saved / "p=2", weights_only=False, verbose=False)
    return {
        "trained": trained,
        "average": started.average,
        "model": started.model,
        "loaded": whole_weights(validated.lightning_module),
    }


def test_checkpoints_with_and_without_averages_load_where_the_other_is_expected(
    in_job: dict[str, list[dict[str, Any]]], saved: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(saved / "p=2")
    stored = stored_model(opened)
    expected = read_tensors(opened, stored, list(stored.shapes))
    for found in cases_on_ranks({"": partial(mixed, tmp_path, saved)})[""]:
        assert same(found["average"], found["trained"]) and same(found["model"], found["trained"])
        assert same(dict(sorted(found["loaded"].items())), dict(sorted(expected.items())))


def test_averages_count_among_the_model_states(tmp_path):
    callbacks = [EMAWeightAveraging(), StochasticWeightAveraging(1e-2), Watched()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, devices=1, strategy="auto")
    assert number_of_averages(trainer) == 2
