"""``save_frozen=False``: checkpoints of adapters alone, which resume over the base model that the module has."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mics import MiCSFabricStrategy, MiCSPlugin, MiCSStrategy, load_pretrained
from lightning_mics.checkpoint.content.trained_only import TRAINED_ONLY_KEY
from lightning_mics.checkpoint.export import export
from lightning_mics.checkpoint.inspect import describe, parts
from lightning_mics.checkpoint.opening import open_checkpoint
from tests.support import accelerators, loops
from tests.support.campaign import campaign
from tests.support.fits import refusal
from tests.support.trainers import cases_on_ranks, make_trainer, mics
from tests.use.test_adapters import (
    MICRO_STEPS,
    OVER_NODES,
    STEPS,
    Adapted,
    adapted,
    base,
    data,
    llama,
    loss_of,
    trained,
)

IN_NODES = {"partition_size": 2, "ranks_per_node": 2}
TWO_NODES = {**OVER_NODES, "partition_size": 2, "ranks_per_node": 1}
RANKS = {False: 4, True: 2}  # by whether there are averages
SAVED = {False: OVER_NODES, True: TWO_NODES}
RESUMED = {False: [OVER_NODES, IN_NODES], True: [{"partition_size": 1}]}


class WithBuffer(Adapted):
    """Adapters, and a buffer that counts micro-steps."""

    def __init__(self, name: str = "llama") -> None:
        super().__init__(name)
        self.register_buffer("seen", torch.zeros(()))
        self.began: dict[str, Tensor] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        self.began = {**trained(self), "seen": self.seen.clone()}


def without_adapters(module: WithBuffer) -> WithBuffer:
    """The module with its base model, and zeros for all else, which the checkpoint has to give."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0 if parameter.requires_grad else 1)
    return module


def fit(
    folder: Path,
    layout: dict[str, Any],
    *,
    epochs: int = 1,
    resumes: Path | None = None,
    average: bool = False,
    saves: str | None = None,
    **more: Any,
) -> tuple[pl.Trainer, WithBuffer]:
    """A fit, which saves at the end of its first epoch: after a fit the model is the average."""
    ranks = dist.get_world_size()
    module = WithBuffer() if resumes is None else without_adapters(WithBuffer())
    callbacks: list[Any] = [EMAWeightAveraging(decay=0.9)] if average else []
    if saves is not None:
        callbacks.append(ModelCheckpoint(folder, filename=saves, save_top_k=-1))
    trainer = make_trainer(
        folder,
        devices=ranks,
        strategy=mics(**{**layout, "save_frozen": False, **more}),
        accumulate_grad_batches=MICRO_STEPS,
        use_distributed_sampler=False,
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=saves is not None,
    )
    trainer.fit(module, data(ranks), ckpt_path=resumes, weights_only=False)
    return trainer, module


def mean_losses(module: WithBuffer) -> list[float]:
    losses = torch.tensor(module.losses)
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def averages(trainer: pl.Trainer) -> dict[str, Tensor]:
    """What trains of the averages; every rank calls it."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, EMAWeightAveraging)]  # type: ignore[attr-defined]
    return {name: value for callback in found for name, value in trained(callback._average_model).items()}


def saved(folder: Path, average: bool) -> dict[str, Any]:
    found = {}
    for kind in ("sharded", "full"):
        _, module = fit(folder, SAVED[average], average=average, saves=kind, state_dict_type=kind)
        found[kind] = {"trained": trained(module), "adapters": sum(v.nbytes for v in trained(module).values())}
    return found


def resumed(folder: Path, average: bool, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for layout in layouts:
        for kind in ("sharded", "full"):
            trainer, module = fit(folder, layout, epochs=2, resumes=folder / f"{kind}.ckpt", average=average)
            found.append({"losses": mean_losses(module), "began": module.began, "average": averages(trainer)})
    return found


def unbroken(folder: Path, average: bool) -> dict[str, Any]:
    trainer, module = fit(folder, SAVED[average], epochs=2, average=average)
    return {"losses": mean_losses(module), "average": averages(trainer)}


@pytest.fixture(scope="module", params=[False, campaign(True)], ids=["weights", "averages"])
def average(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, average: bool) -> Path:
    return tmp_path_factory.mktemp("averages" if average else "weights")


@pytest.fixture(scope="module")
def runs(folder: Path, average: bool) -> dict[str, list[Any]]:
    cases: dict[str, Any] = {
        "saved": partial(saved, folder, average),
        "resumed": partial(resumed, folder, average, RESUMED[average]),
        "unbroken": partial(unbroken, folder, average),
    }
    return cases_on_ranks(cases, world_size=RANKS[average])


def check_resumed(found: list[dict[str, Any]], runs: dict[str, list[Any]], average: bool) -> None:
    expected = runs["unbroken"][0]
    for case in found:
        assert case["losses"] == pytest.approx(expected["losses"][STEPS * MICRO_STEPS :], abs=1e-6)
        if not average:  # after its fit the model is the average
            weights = runs["saved"][0]["sharded"]["trained"]
            assert all(torch.equal(value, case["began"][name]) for name, value in weights.items())
        assert case["began"]["seen"] == STEPS * MICRO_STEPS
        assert bool(case["average"]) == average
        for name, value in case["average"].items():
            torch.testing.assert_close(value, expected["average"][name], atol=1e-6, rtol=0)


def test_files_hold_what_trains_alone(runs: dict[str, list[Any]], folder: Path, average: bool) -> None:
    adapters, seen = runs["saved"][0]["sharded"]["adapters"], 4  # bytes, those of the buffer beside them
    stored = parts(open_checkpoint(folder / "sharded.ckpt"))
    assert stored["model (average)" if average else "model"].size_bytes == adapters + seen
    assert ("current model" in stored) == average
    content = torch.load(folder / "full.ckpt", weights_only=False)
    assert {name for name in content["state_dict"] if name != "seen"} == runs["saved"][0]["full"]["trained"].keys()
    frozen = [p for p in Adapted("llama").parameters() if not p.requires_grad]
    said = f"{len(frozen)} frozen tensors of {sum(p.nbytes for p in frozen):,} bytes"
    assert dict(describe(folder / "sharded.ckpt"))["left out"] == f"{said}: save_frozen=False"


def test_a_job_resumes_over_the_base_model(runs: dict[str, list[Any]], average: bool) -> None:
    for found in runs["resumed"]:
        check_resumed(found, runs, average)


@pytest.mark.parametrize("average", [False], ids=["weights"], indirect=True)
def test_a_job_of_fewer_ranks_resumes_over_it(runs: dict[str, list[Any]], folder: Path, average: bool) -> None:
    found = cases_on_ranks({"": partial(resumed, folder, average, [IN_NODES, {"partition_size": 1}])}, world_size=2)
    for of_rank in found[""]:
        check_resumed(of_rank, runs, average)


# -- sizes of files ----------------------------------------------------------------------------------------------------


def of_large_adapters(folder: Path) -> int:
    """Save adapters of a few megabytes, after a step; returns their bytes."""
    for kind in ("sharded", "full"):
        module = Adapted("llama")
        config = LlamaConfig(
            vocab_size=32, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2
        )
        module.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=256, target_modules="all-linear"))
        strategy = mics(**OVER_NODES, save_frozen=False, state_dict_type=kind)
        trainer = make_trainer(folder, strategy=strategy, use_distributed_sampler=False, max_steps=1)
        trainer.fit(module, data(4))
        trainer.save_checkpoint(folder / kind)
    return sum(value.nbytes for value in trained(module).values())


def test_files_are_little_larger_than_adapters_and_the_states_of_adam(tmp_path: Path) -> None:
    adapters = cases_on_ranks({"": partial(of_large_adapters, tmp_path)})[""][0]
    for kind in ("sharded", "full"):
        files = [file for file in (tmp_path / kind).rglob("*") if file.is_file()] or [tmp_path / kind]
        assert 3 * adapters < sum(file.stat().st_size for file in files) <= 3.3 * adapters + 2**16


# -- without a base model ----------------------------------------------------------------------------------------------


class OnMeta(Adapted):
    """Built on the meta device, with the weights of a folder or without."""

    def __init__(self, folder: Path | None) -> None:
        pl.LightningModule.__init__(self)
        self.base_folder, self.model, self.losses, self.sent, self.folder = folder, None, [], [0.0], None

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta"):
                self.model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
            if self.base_folder is not None:
                load_pretrained(self.model, self.base_folder)


def of_meta(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder, strategy=mics(**OVER_NODES, save_frozen=False), use_distributed_sampler=False)
    module = OnMeta(folder / "base")
    callback = ModelCheckpoint(folder / "callback", save_last=True, every_n_train_steps=2)
    trainer.callbacks.append(callback)
    trainer.fit(module, data(4))
    last = callback.last_model_path
    refused = {
        "fit": refusal(lambda: again(folder).fit(OnMeta(None), data(4), ckpt_path=last)),
        "validate": refusal(lambda: again(folder).validate(Validated(None), data(4), ckpt_path=last)),
        "fabric": refusal(lambda: in_fabric(folder, last)),
    }
    over_base = OnMeta(folder / "base")
    again(folder, max_epochs=2).fit(over_base, data(4), ckpt_path=last)
    strict = refusal(lambda: Whole.load_from_checkpoint(last))
    loaded = Whole.load_from_checkpoint(last, strict=False)
    exported = refusal(lambda: export(Path(last), folder / "exported"))
    same = {name: torch.equal(value, trained(module)[name]) for name, value in trained(loaded).items()}
    return {
        "refused": refused,
        "resumed": over_base.losses,
        "strict": strict,
        "same": same,
        "export": exported,
        "last": last,
    }


class Validated(OnMeta):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.model, batch), sync_dist=True)


class Whole(Adapted):
    """A module that has its base model when it is built."""

    def __init__(self) -> None:
        super().__init__("llama")


def again(folder: Path, **options: Any) -> pl.Trainer:
    return make_trainer(
        folder, strategy=mics(**OVER_NODES, save_frozen=False), use_distributed_sampler=False, **options
    )


def in_fabric(folder: Path, last: str) -> None:
    fabric = loops.start(**OVER_NODES)
    module = OnMeta(None)
    module.configure_model()
    model = fabric.setup_module(module)
    fabric.load(last, {"state_dict": model})


def test_where_the_base_model_is_missing_loading_is_refused_by_name(tmp_path: Path) -> None:
    base("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for found in cases_on_ranks({"": partial(of_meta, tmp_path)})[""]:
        for how, said in found["refused"].items():
            assert "holds only what trains: it was saved with save_frozen=False" in said, (how, said)
            assert "This model has no weights for" in said and "from_pretrained" in said and "load_pretrained" in said
        assert len(found["resumed"]) == STEPS * MICRO_STEPS  # of the second epoch
        assert "Whole has them when it is built, call load_from_checkpoint(..., strict=False)" in found["strict"]
        assert all(found["same"].values()) and found["same"]
        assert "An export needs the base model too" in found["export"]
    inspected = subprocess.run(
        [sys.executable, "-m", "lightning_mics", "inspect", found["last"]], capture_output=True, text=True, check=True
    )
    assert "frozen tensors of" in inspected.stdout and "save_frozen=False" in inspected.stdout


# -- Fabric and Accelerate ---------------------------------------------------------------------------------------------


def two_steps(step: Any) -> list[float]:
    return [step(batch) for _, batch in zip(range(2), data(4), strict=False)]


@torch.no_grad()
def zero_adapters(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()


def of_fabric(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("sharded", "full"):
        losses = []
        for turn in range(2):
            fabric = loops.start(**OVER_NODES, state_dict_type=kind, save_frozen=False)
            model = adapted("llama")
            if turn:
                zero_adapters(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
            model, optimizer = fabric.setup(model, optimizer)

            def step(batch: Tensor, fabric: Any = fabric, model: Any = model, optimizer: Any = optimizer) -> float:
                loss = loss_of(model, batch)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                return float(loss.detach())

            state = {"model": model, "optimizer": optimizer, "done": 2}
            if turn:
                remainder = fabric.load(folder / f"fabric {kind}", state)
                assert not remainder, remainder
            else:
                two_steps(step)
                fabric.save(folder / f"fabric {kind}", state)
            losses.append(two_steps(step))
        found[kind] = losses
    return found


def of_accelerate(folder: Path) -> list[list[float]]:
    losses = []
    for turn in range(2):
        accelerator = accelerators.start(plugin={**OVER_NODES, "save_frozen": False})
        model = adapted("llama")
        if turn:
            zero_adapters(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        plugin = accelerators.plugin_of(accelerator)

        def step(
            batch: Tensor, accelerator: Any = accelerator, model: Any = model, optimizer: Any = optimizer
        ) -> float:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        if turn:
            plugin.load_checkpoint(accelerator, folder / "accelerate")
        else:
            two_steps(step)
            plugin.save_checkpoint(accelerator, folder / "accelerate", done=2)
        losses.append(two_steps(step))
    return losses


def test_the_same_in_loops_of_ones_own(tmp_path: Path) -> None:
    found = cases_on_ranks({"fabric": partial(of_fabric, tmp_path), "accelerate": partial(of_accelerate, tmp_path)})
    adapters = sum(p.nbytes for p in adapted("llama").parameters() if p.requires_grad)
    for name in ("fabric sharded", "accelerate"):
        stored = parts(open_checkpoint(tmp_path / name))
        assert stored["model"].size_bytes == adapters
        assert sum(part.size_bytes for part in stored.values()) < 3.1 * adapters
    assert TRAINED_ONLY_KEY in torch.load(tmp_path / "fabric full", weights_only=True)
    for one, other in [*found["fabric"][0].values(), *found["accelerate"]]:
        assert one == other


@pytest.mark.parametrize("taker", [MiCSStrategy, MiCSFabricStrategy, MiCSPlugin])
def test_a_value_that_is_no_flag_is_refused(taker: Any) -> None:
    with pytest.raises(ValueError, match="save_frozen='no' is neither True nor False"):
        taker(save_frozen="no")
