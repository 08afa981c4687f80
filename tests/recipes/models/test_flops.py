from __future__ import annotations

import re

import pytest

from recipes.models.flops import TransformerShape, tflops_per_gpu

BERT_10B = TransformerShape.plain(layers=127, hidden=2560, vocab=32008)


LENGTH = 512


def test_the_papers_check_value() -> None:
    """BERT 10B at 165.38 sequences/s on 128 GPUs."""
    flops = BERT_10B.training_flops(LENGTH, recomputed_share=1)
    assert tflops_per_gpu(flops, sequences_per_s=165.38, gpus=128) == pytest.approx(54.94, abs=0.005)


@pytest.mark.parametrize(("layers", "hidden", "vocab", "length"), [(127, 2560, 32008, 512), (96, 12288, 50265, 2048)])
def test_both_formulas_are_the_papers(layers: int, hidden: int, vocab: int, length: int) -> None:
    shape = TransformerShape.plain(layers=layers, hidden=hidden, vocab=vocab)
    hardware = 96 * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
    model = 72 * length * layers * hidden**2 * (1 + length / (6 * hidden)) + 6 * length * hidden * vocab
    assert shape.training_flops(length, recomputed_share=1) == pytest.approx(hardware)
    assert shape.training_flops(length) == pytest.approx(model)


def test_half_of_the_blocks_recomputed_costs_half_as_much_more() -> None:
    none, half, full = (BERT_10B.training_flops(LENGTH, recomputed_share=share) for share in (0, 0.5, 1))
    assert full - none == pytest.approx(2 * (half - none)) != 0


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("recomputed_share=2 is not between 0 and 1")):
        BERT_10B.training_flops(LENGTH, recomputed_share=2)
