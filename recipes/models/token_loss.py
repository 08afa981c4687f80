"""The negative log-likelihood of targets in float32, without full float32 copies of the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PART_ELEMENTS = 2**26  # logits that are in float32 at once, 256 MiB


def nats_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each token, float32 ``[tokens]``; zero where the target is -100.

    With a large vocabulary the logits are the largest tensor of a step, and backward would hold them several times in
    float32. So they are taken in parts, and the softmax of a part is computed again in backward rather than kept. What
    is one part by itself is not computed twice.

    Args:
        logits: ``[tokens, vocab]``, of any precision.
        targets: ``[tokens]``.
    """
    rows = max(1, PART_ELEMENTS // logits.shape[-1])
    if len(logits) <= rows:
        return _nats(logits, targets)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_nats, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")
