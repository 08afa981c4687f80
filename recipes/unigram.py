"""The loss of a model that knows only how frequent each token is: a model that does better has learned their order."""

from __future__ import annotations

import numpy as np


def unigram_loss(train_tokens: np.ndarray, val_tokens: np.ndarray, *, vocab_size: int) -> float:
    """Mean negative log-likelihood, nats per token, of ``val_tokens`` under the frequencies of ``train_tokens``.

    One is added to every count, so that a token which training never showed is improbable, not impossible.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1  # [vocab]
    return float(-np.log(counts / counts.sum())[val_tokens].mean())
