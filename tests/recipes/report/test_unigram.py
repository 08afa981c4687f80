from __future__ import annotations

import math

import numpy as np
import pytest

from recipes.report.baselines import unigram_loss


def test_unigram_loss_is_the_mean_log_frequency_with_one_added() -> None:
    train = np.array([0, 0, 0, 1], dtype=np.uint16)
    expected = (math.log(8 / 4) + math.log(8 / 2) + math.log(8 / 1)) / 3  # counts with one added: 4, 2, 1, 1
    assert unigram_loss(train, np.array([0, 1, 3]), vocab_size=4) == pytest.approx(expected)
