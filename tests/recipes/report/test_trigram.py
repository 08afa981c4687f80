from __future__ import annotations

import numpy as np
import pytest

from recipes.report.baselines import trigram_loss, unigram_loss


def second_order_text(length: int, *, seed: int) -> np.ndarray:
    """Each token is the sum of the two before it, but for one in four, which is random."""
    draw = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(length - 2):
        tokens.append(int(draw.integers(7)) if draw.random() < 0.25 else (tokens[-1] + tokens[-2]) % 7)
    return np.array(tokens, dtype=np.uint16)


def test_it_finds_what_two_tokens_of_context_tell() -> None:
    train, val = second_order_text(20000, seed=0), second_order_text(5000, seed=1).reshape(50, 100)
    predictable, other = 0.75 + 0.25 / 7, 0.25 / 7
    entropy = -(predictable * np.log(predictable) + 6 * other * np.log(other))
    assert trigram_loss(train, val, vocab_size=7) == pytest.approx(entropy, rel=0.03)
    assert unigram_loss(train, val.flatten(), vocab_size=7) > 1.5 * entropy


def test_probabilities_of_all_tokens_add_up_to_one() -> None:
    train = second_order_text(300, seed=0) * 2  # half of a vocabulary of 14 never occurs
    for context in ([0, 2], [1, 1], [3, 0]):  # seen, and not
        losses = [trigram_loss(train, np.array([[*context, last]]), vocab_size=14) for last in range(14)]
        assert np.exp(-np.array(losses)).sum() == pytest.approx(1)


def test_tokens_that_training_never_showed_are_improbable_not_impossible() -> None:
    loss = trigram_loss(np.zeros(100, dtype=np.uint16), np.array([[0, 0, 5, 5, 5]]), vocab_size=10)
    assert 1 < loss < 20


@pytest.mark.parametrize("short", ["train_tokens", "val_windows"])
def test_fewer_tokens_than_one_trigram_are_refused(short: str) -> None:
    tokens = {"train_tokens": np.arange(5), "val_windows": np.arange(5)[None]} | {short: np.arange(2)[None]}
    with pytest.raises(ValueError, match=rf"{short} has 2 tokens; a trigram needs at least 3"):
        trigram_loss(**tokens, vocab_size=10)
