"""The loss of a trigram model with backoff: what counting alone reaches, without any learned representation.

Interpolated Kneser-Ney (Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998,
section 2.7): each order subtracts a discount from its counts and gives what that frees to the next lower order, whose
counts are of distinct left neighbors. It is the strongest of the classical n-gram models of that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def trigram_loss(train_tokens: np.ndarray, val_windows: np.ndarray, *, vocab_size: int) -> float:
    """Mean negative log-likelihood, nats per token, of ``val_windows`` under trigrams of ``train_tokens``.

    Args:
        train_tokens: ``[tokens]``.
        val_windows: ``[windows, length]``; the first two tokens of each are context only.
        vocab_size: Tokens there are.

    Raises:
        ValueError: If either is shorter than one trigram.
    """
    for name, tokens in (("train_tokens", train_tokens), ("val_windows", val_windows)):
        if tokens.shape[-1] < 3:
            raise ValueError(f"{name} has {tokens.shape[-1]} tokens; a trigram needs at least 3")
    train, val = train_tokens.astype(np.int64), val_windows.astype(np.int64)
    trigrams = _Counts.of(_keys(train, 3, vocab_size), vocab_size)
    bigrams = _Counts.of(trigrams.keys % vocab_size**2, vocab_size)  # each trigram type counts once
    unigrams = np.bincount(bigrams.keys % vocab_size, minlength=vocab_size)
    lower = ((unigrams + 1) / (unigrams.sum() + vocab_size))[val[:, 2:]]  # one more, so that no token is impossible
    for counts, order in ((bigrams, 2), (trigrams, 3)):
        lower = counts.interpolate(_keys(val, order, vocab_size)[:, 3 - order :], lower)
    return float(-np.log(lower).mean())


def _keys(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """One integer for each run of ``order`` tokens, ``[..., tokens - order + 1]``; its last digit is the last token."""
    count = tokens.shape[-1] - order + 1
    keys = np.zeros((*tokens.shape[:-1], count), dtype=np.int64)
    for first in range(order):
        keys = keys * vocab_size + tokens[..., first : first + count]
    return keys


@dataclass(frozen=True)
class _Counts:
    """How often each n-gram occurs, and in how many ways each context (all but its last token) continues."""

    keys: np.ndarray  # [types], sorted
    counts: np.ndarray  # [types]
    contexts: np.ndarray  # [contexts], sorted
    totals: np.ndarray  # [contexts]: occurrences
    followers: np.ndarray  # [contexts]: distinct last tokens
    vocab_size: int

    @classmethod
    def of(cls, keys: np.ndarray, vocab_size: int) -> _Counts:
        types, counts = np.unique(keys, return_counts=True)
        contexts, context_of, followers = np.unique(types // vocab_size, return_inverse=True, return_counts=True)
        return cls(types, counts, contexts, np.bincount(context_of, counts), followers, vocab_size)

    @property
    def discount(self) -> float:
        """From the numbers of n-grams seen once and twice (Ney, Essen and Kneser, 1994)."""
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        return float(once / (once + 2 * twice)) if once else 0.5

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The probability of each n-gram's last token, ``[keys]``, given that of the order below."""
        counts = _look_up(keys, self.keys, self.counts)
        contexts = keys // self.vocab_size
        totals = _look_up(contexts, self.contexts, self.totals)
        freed = self.discount * _look_up(contexts, self.contexts, self.followers)
        seen = np.maximum(counts - self.discount, 0) + freed * lower
        return np.where(totals > 0, seen / np.maximum(totals, 1), lower)


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` at ``keys``, 0 for those that are not ``known`` (sorted)."""
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)


def causal_baselines(data: Any) -> dict[str, float]:
    """Losses, nats per token, on the validation windows of a data module that is set up for the causal objective."""
    windows = np.stack([window.numpy() for window in data.val])  # [windows, length + 1]
    train_tokens = np.asarray(data.train_tokens)
    return {
        "unigram model": unigram_loss(train_tokens, windows[:, 1:].flatten(), vocab_size=data.vocab_size),
        "trigram model with backoff": trigram_loss(train_tokens, windows, vocab_size=data.vocab_size),
    }


def masked_baselines(data: Any) -> dict[str, float]:
    """The share of the validation tokens that whoever always guesses the most frequent training token gets right."""
    guess = np.bincount(np.asarray(data.train_tokens)).argmax()
    return {"always the most frequent token": float((data.val_targets() == guess).mean())}


def unigram_loss(train_tokens: np.ndarray, val_tokens: np.ndarray, *, vocab_size: int) -> float:
    """Mean negative log-likelihood, nats per token, of ``val_tokens`` under the frequencies of ``train_tokens``.

    One is added to every count, so that a token which training never showed is improbable, not impossible.
    """
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1  # [vocab]
    return float(-np.log(counts / counts.sum())[val_tokens].mean())
