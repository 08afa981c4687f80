"""Adapters of ``peft``, sharded over all nodes: trained, saved and loaded, and only their bytes cross nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_mics import CommunicationOptions, load_pretrained
from lightning_mics.checkpoint.inspect import parts
from lightning_mics.checkpoint.opening import open_checkpoint
from tests.support import accelerators, loops
from tests.support.campaign import campaign
from tests.support.fits import refusal
from tests.support.narrow import narrow
from tests.support.trainers import cases_on_ranks, make_trainer, mics

VOCAB, STEPS, MICRO_STEPS, RANKS, NODES = 32, 4, 2, 4, 2
PER_BATCH = 8  # sequences of all ranks together
R = 2  # of adapters: fewer rows than ranks
OVER_NODES = {"partition_size": 4, "ranks_per_node": 2, **CommunicationOptions.NODE.keywords()}
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32}
LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **LAYERS))


def bert() -> nn.Module:
    config = BertConfig(**SMALL, **LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


BASES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "t5": t5}


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[name]()


def adapted(name: str) -> Any:
    model = get_peft_model(base(name), LoraConfig(r=R, target_modules="all-linear"))
    with torch.no_grad():  # peft begins with zeros in B, so that A has no gradient
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
    return model


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


class Adapted(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = adapted(name)
        self.losses: list[float] = []
        self.sent = [0.0]
        self.folder: Path | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        traffic = getattr(self.trainer.strategy, "traffic", None)
        if traffic is not None and len(self.losses) % MICRO_STEPS == 0:
            self.sent.append(NODES * sum(each.between_bytes for each in traffic.by_technique().values()))

    def on_train_end(self) -> None:
        if self.folder is not None:
            self.model.save_pretrained(self.folder)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def sequences() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (PER_BATCH * MICRO_STEPS * STEPS, 6), generator=generator)


def data(ranks: int) -> DataLoader[Any]:
    sampler: Any = DistributedSampler(sequences(), ranks, dist.get_rank(), shuffle=False) if ranks > 1 else None  # type: ignore[arg-type]
    return DataLoader(sequences(), batch_size=PER_BATCH // ranks, sampler=sampler)  # type: ignore[arg-type]


def train(folder: Path, name: str, layout: dict[str, Any] | None, **options: Any) -> Adapted:
    module = Adapted(name)
    module.folder = folder / name if layout else None
    ranks = RANKS if layout else 1
    trainer = make_trainer(
        folder,
        devices=ranks,
        strategy=mics(**layout) if layout else "auto",
        accumulate_grad_batches=MICRO_STEPS,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, data(ranks))
    return module


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What trains, whole; every rank calls it."""
    return {name: whole(parameter) for name, parameter in module.named_parameters() if parameter.requires_grad}


def of_job(folder: Path, name: str) -> dict[str, Any]:
    module = train(folder, name, OVER_NODES)
    losses = torch.tensor(module.losses)
    dist.all_reduce(losses)
    sent = [after - before for before, after in pairwise(module.sent)]
    return {
        "losses": (losses / RANKS).tolist(),
        "sent": sent,
        "trained": trained(module.model),
        "narrow": narrow(module.model),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def runs(folder: Path, in_campaign: bool) -> dict[str, list[dict[str, Any]]]:
    return cases_on_ranks({name: partial(of_job, folder, name) for name in (BASES if in_campaign else ["llama"])})


@pytest.mark.parametrize("name", ["llama", *map(campaign, ["bert", "t5"])])
def test_adapters_train_as_in_one_process_and_nothing_else_crosses_nodes(
    name: str, runs: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    alone = train(folder, name, None)
    adapters = sum(value.nbytes for value in trained(alone.model).values())
    bound = 2 * adapters * (NODES - 1) / NODES
    for found in runs[name]:
        assert found["losses"] == pytest.approx(alone.losses, abs=1e-5)
        assert found["sent"][0] > bound
        assert all(bound <= each <= 1.02 * bound for each in found["sent"][1:])
        assert found["narrow"] == [key for key in trained(alone.model) if "lora_A" in key]
        for key, value in trained(alone.model).items():
            torch.testing.assert_close(found["trained"][key], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", *map(campaign, ["bert", "t5"])])
def test_saved_adapters_load_into_the_base_model_of_one_process(
    name: str, runs: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    loaded = PeftModel.from_pretrained(base(name), str(folder / name))
    found = {key: value for key, value in loaded.named_parameters() if "lora_" in key}
    expected = runs[name][0]["trained"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


# -- Fabric and Accelerate --------------------------------------------------------------------------------------------


def in_fabric(folder: Path) -> dict[str, Any]:
    fabric = loops.start(**OVER_NODES)
    model = adapted("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for index, batch in enumerate(data(RANKS)):
        boundary = index % MICRO_STEPS == MICRO_STEPS - 1
        with fabric.no_backward_sync(model, enabled=not boundary):
            loss = loss_of(model, batch)
            fabric.backward(loss / MICRO_STEPS)
        losses.append(float(loss.detach()))
        if boundary:
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder / "of fabric")
    return {"losses": losses, "trained": trained(model.module)}


def in_accelerate(folder: Path) -> dict[str, Any]:
    accelerator = accelerators.start(plugin=OVER_NODES, gradient_accumulation_steps=MICRO_STEPS)
    model = adapted("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in data(RANKS):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    accelerator.unwrap_model(model).save_pretrained(folder / "of accelerate")
    return {"losses": losses, "trained": trained(model)}


@pytest.fixture(scope="module")
def integrated(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return cases_on_ranks({"fabric": partial(in_fabric, folder), "accelerate": partial(in_accelerate, folder)})


@pytest.mark.parametrize("host", ["fabric", "accelerate"])
def test_the_same_in_loops_of_ones_own(
    host: str, integrated: dict[str, list[dict[str, Any]]], runs: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    expected = runs["llama"][0]
    mean = torch.tensor([found["losses"] for found in integrated[host]]).mean(0)
    assert mean.tolist() == pytest.approx(expected["losses"], abs=1e-6)
    loaded = PeftModel.from_pretrained(base("llama"), str(folder / f"of {host}"))
    found = {key: value for key, value in loaded.named_parameters() if "lora_" in key}
    for key, value in integrated[host][0]["trained"].items():
        assert torch.equal(value, found[key])
        torch.testing.assert_close(value, expected["trained"][key], atol=1e-6, rtol=0)


def prompted() -> Any:
    return get_peft_model(base("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def of_prompts(folder: Path) -> Tensor:
    fabric = loops.start(**OVER_NODES)
    model = prompted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    fabric.backward(loss_of(model, next(iter(data(RANKS)))))
    optimizer.step()
    optimizer.zero_grad()
    model.save_pretrained(folder / "prompts")
    return next(iter(trained(model.module).values()))


def test_learned_prompts_are_saved_too(tmp_path: Path) -> None:
    weights = cases_on_ranks({"": partial(of_prompts, tmp_path)})[""][0]
    loaded = PeftModel.from_pretrained(base("llama"), str(tmp_path / "prompts"))
    assert torch.equal(next(iter(loaded.prompt_encoder.parameters())), weights)


# -- checkpoints of adapters alone -------------------------------------------------------------------------------------


class SavedAlone(Adapted):
    """Lightning's own way to save a part of the weights."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.strict_loading = False
        self.began: dict[str, Tensor] = {}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}

    def on_train_start(self) -> None:
        self.began = trained(self)


def saved_alone(folder: Path, layout: dict[str, Any], resumed: bool) -> dict[str, Any]:
    module = SavedAlone("llama")
    if resumed:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0 if parameter.requires_grad else 1)
    trainer = make_trainer(
        folder,
        devices=RANKS,
        strategy=mics(**layout),
        accumulate_grad_batches=MICRO_STEPS,
        use_distributed_sampler=False,
        max_epochs=2 if resumed else 1,
    )
    trainer.fit(module, data(RANKS), ckpt_path=folder / "alone" if resumed else None)
    weights = trained(module)
    if not resumed:
        trainer.save_checkpoint(folder / "alone")
    return {"began": module.began, "weights": weights, "losses": module.losses}


def all_saved(folder: Path) -> dict[str, Any]:
    """The same two epochs without a break."""
    module = Adapted("llama")
    options: dict[str, Any] = {"devices": RANKS, "accumulate_grad_batches": MICRO_STEPS, "max_epochs": 2}
    trainer = make_trainer(folder, strategy=mics(**OVER_NODES), use_distributed_sampler=False, **options)
    trainer.fit(module, data(RANKS))
    return {"weights": trained(module), "losses": module.losses}


def test_checkpoints_of_adapters_alone_are_small_and_resume_over_the_base_model(tmp_path: Path) -> None:
    cases = {
        "saved": partial(saved_alone, tmp_path, OVER_NODES, False),
        "resumed": partial(saved_alone, tmp_path, OVER_NODES, True),
        "in nodes": partial(saved_alone, tmp_path, {"partition_size": 2, "ranks_per_node": 2}, True),
        "unbroken": partial(all_saved, tmp_path),
    }
    found = cases_on_ranks(cases)
    adapters = sum(value.nbytes for value in found["saved"][0]["weights"].values())
    stored = parts(open_checkpoint(tmp_path / "alone"))
    assert stored["model"].size_bytes == adapters
    assert sum(part.size_bytes for name, part in stored.items() if name != "rank states") < 3.1 * adapters
    for case in ("resumed", "in nodes"):
        for rank, of_rank in enumerate(found[case]):
            assert all(torch.equal(v, found["saved"][rank]["weights"][key]) for key, v in of_rank["began"].items())
            unbroken = found["unbroken"][rank]
            assert of_rank["losses"] == pytest.approx(unbroken["losses"][len(of_rank["losses"]) :], abs=1e-6)
            for key, value in of_rank["weights"].items():
                torch.testing.assert_close(value, unbroken["weights"][key], atol=1e-6, rtol=0)


# -- built on the meta device ------------------------------------------------------------------------------------------


def on_meta(pretrained: Path, **options: Any) -> Any:
    with torch.device("meta"):
        model = get_peft_model(llama(), LoraConfig(r=R, target_modules="all-linear", **options))
    load_pretrained(model, pretrained)
    return model


class BuiltLate(pl.LightningModule):
    """Built on the meta device, with the weights of a folder."""

    def __init__(self, pretrained: Path, **options: Any) -> None:
        super().__init__()
        self.pretrained, self.options = pretrained, options
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = on_meta(self.pretrained, **self.options)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.model, batch), sync_dist=True)


def started(pretrained: Path, **options: Any) -> tuple[float, dict[str, Tensor]]:
    trainer = make_trainer(pretrained, devices=RANKS, strategy=mics(**OVER_NODES), use_distributed_sampler=False)
    module = BuiltLate(pretrained, **options)
    (metrics,) = trainer.validate(module, data(RANKS), verbose=False)
    return metrics["val_loss"], trained(module.model)


def refused(pretrained: Path) -> str:
    return refusal(lambda: started(pretrained, init_lora_weights="pissa"))


def test_adapters_that_are_built_on_the_meta_device_begin_as_the_base_model(tmp_path: Path) -> None:
    model: Any = base("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = sum(float(loss_of(model, batch)) for batch in data(1)) / len(data(1))
    cases: dict[str, Any] = {
        "True": partial(started, tmp_path),
        "gaussian": partial(started, tmp_path, init_lora_weights="gaussian"),
        "refused": partial(refused, tmp_path),
    }
    found = cases_on_ranks(cases)
    for kind in ("True", "gaussian"):
        for loss, adapters in found[kind]:
            assert loss == pytest.approx(expected, abs=1e-5)
            assert all(bool(value.any()) == ("lora_A" in name) for name, value in adapters.items())
            largest = max(float(value.abs().max()) for value in adapters.values())
            assert (largest > 0.4) == (kind == "gaussian")  # of uniform ones at most 1 / sqrt(16)
    assert all("'pissa' begins from the weights of the base model" in said for said in found["refused"])
