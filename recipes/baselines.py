"""What counting reaches on the tokens of a run: a model that does no better has learned nothing beyond it."""

from __future__ import annotations

from typing import Any

import numpy as np

from recipes.trigram import trigram_loss
from recipes.unigram import unigram_loss


def causal_baselines(data: Any) -> dict[str, float]:
    """Losses, nats per token, on the validation windows of a data module that is set up for the causal objective."""
    windows = np.stack([window.numpy() for window in data.val])  # [windows, length + 1]
    return {
        "unigram model": unigram_loss(data.train_tokens, windows[:, 1:].flatten(), vocab_size=data.vocab_size),
        "trigram model with backoff": trigram_loss(data.train_tokens, windows, vocab_size=data.vocab_size),
    }


def masked_baselines(data: Any) -> dict[str, float]:
    """The share of the validation tokens that whoever always guesses the most frequent training token gets right."""
    guess = np.bincount(data.train_tokens).argmax()
    return {"always the most frequent token": float((data.val_targets() == guess).mean())}
