from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch.utils.data import DataLoader

import train
from recipes.callbacks.throughput import Throughput
from recipes.models.causal_lm import CausalLM
from recipes.models.flops import measure_shape
from recipes.models.masked_lm import MaskedLM
from tests.support.configs import composed
from tests.support.networks import BERT, GPT
from tests.support.trainers import make_trainer

OBJECTIVES = {"causal": (CausalLM, GPT), "masked": (MaskedLM, BERT)}


LENGTH = 8


def model_of(objective: str) -> Any:
    model_class, network = OBJECTIVES[objective]
    return model_class(network=network, optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def throughput(**options: Any) -> Throughput:
    return Throughput(**{"sequence_length": LENGTH, "peak_tflops": None, "activation_checkpointing": True, **options})


class Clock:
    """A second passes with every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rates_are_of_all_sequences_since_the_last_log_without_the_time_of_validation(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 steps of 2 micro-steps of 3 sequences, of which step 4 is logged; a validation before and after step 3."""
    model, clock, noted = model_of(objective), Clock(), []

    class Noted(Throughput):
        def on_validation_end(self, *_: Any) -> None:
            clock.now += 100

        def rates(self, *, gpus: int) -> dict[str, float]:
            noted.append(super().rates(gpus=gpus))
            return noted[-1]

    watch = Noted(sequence_length=LENGTH, peak_tflops=1e-6, activation_checkpointing=True)
    batches = [model.example_batch(1, LENGTH)] * 30
    data = DataLoader([_first(batch) for batch in batches], batch_size=3)
    trainer = make_trainer(
        tmp_path,
        strategy="auto",
        devices=1,
        callbacks=[watch],
        accumulate_grad_batches=2,
        max_steps=5,
        log_every_n_steps=2,
        val_check_interval=6,
        num_sanity_val_steps=0,
        inference_mode=False,  # as strategy "mics" has it
    )
    model.network = model.build_network()  # with weights, which the strategy would give it
    monkeypatch.setattr("recipes.callbacks.throughput.time", SimpleNamespace(perf_counter=clock))
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data, data)
    first, second = noted
    assert first["samples_per_s"] == 12  # two steps of 6, and one look at the clock since it was set
    assert second["samples_per_s"] == pytest.approx(12 / 2)  # and a look at the end of validation
    for rates in noted:
        assert rates["tokens_per_s"] == LENGTH * rates["samples_per_s"]
        assert rates["hfu_percent"] == pytest.approx(1e8 * rates["hfu_tflops_per_gpu"])
        assert rates["hfu_tflops_per_gpu"] > rates["mfu_tflops_per_gpu"] > 0


def _first(batch: Any) -> Any:
    return {name: value[0] for name, value in batch.items()} if isinstance(batch, dict) else batch[0]


def test_without_a_peak_there_is_no_percentage() -> None:
    watch = throughput()
    watch._flops = {"hfu": 4e12, "mfu": 3e12}
    watch._restart()
    watch._sequences = 80
    assert not [name for name in watch.rates(gpus=4) if "percent" in name]


def test_flops_of_experts_are_not_guessed(tmp_path: Path) -> None:
    model, watch = model_of("causal"), throughput()
    trainer = make_trainer(tmp_path, strategy="auto", devices=1)
    model.configure_model()
    watch.on_train_start(trainer, model)
    assert set(watch._flops) == {"hfu", "mfu"}
    model.experts, watch = torch.nn.Parameter(torch.zeros(2, 3, 4)), throughput()
    watch.on_train_start(trainer, model)
    assert not watch._flops


@pytest.mark.parametrize(("model", "hidden", "layers"), [("gpt2", 768, 12), ("bert-large", 1024, 24)])
def test_the_shape_of_gpt_and_bert_is_the_papers(model: str, hidden: int, layers: int) -> None:
    shape, share = measure_shape(train.make_model(composed(f"model={model}")), "*[02468]")
    assert (shape.hidden, shape.layers, share) == (hidden, layers, 0.5)
    assert shape.block_matrix_parameters == 12 * hidden**2


def test_grouped_queries_and_gated_layers_count_by_their_matrices() -> None:
    shape, share = measure_shape(train.make_model(composed("model=llama-8b")), True)
    attention = 4096 * (4096 + 2 * 1024 + 4096)
    assert shape.block_matrix_parameters == attention + 3 * 4096 * 14336
    assert (shape.attention_width, share) == (4096, 1.0)


@pytest.mark.parametrize("model", ["gpt2", "bert-base", "llama-8b"])
def test_the_formula_is_what_lightning_counts_operator_by_operator(model: str) -> None:
    """A third of the model FLOPs is the forward; BERT's head has a square matrix that the paper leaves out."""
    lm = train.make_model(composed(f"model={model}"))
    lm.config._attn_implementation = "eager"
    with torch.device("meta"):
        network = lm.head.from_config(lm.config, attn_implementation="eager")
        tokens = torch.zeros(1, 256, dtype=torch.int64)
    shape, _ = measure_shape(lm, False)
    counted = measure_flops(network, lambda: network(input_ids=tokens))
    assert shape.training_flops(256) / 3 == pytest.approx(counted, rel=0.01)
