from __future__ import annotations

import time

import pytest

import train
from recipes.throughput import Throughput, measure_shape
from tests.recipes.test_configs import composed


def test_rates_follow_from_sequences_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Throughput(sequence_length=128, peak_tflops=10.0, activation_checkpointing=True)
    now = iter([100.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch._model_flops, watch._hardware_flops = 3e12, 4e12
    watch._restart()
    watch._sequences = 80
    rates = watch.rates(gpus=4)
    assert rates.pop("memory_gib") > 0.01
    assert rates == {
        "samples_per_s": 20.0,
        "tokens_per_s": 2560.0,
        "mfu_tflops_per_gpu": 15.0,
        "hfu_tflops_per_gpu": 20.0,
        "mfu_percent": 150.0,
    }


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
