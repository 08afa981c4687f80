"""Embeddings with sparse gradients: dense ones instead, which is what FSDP2 reduces."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import nn


def make_gradients_dense(model: nn.Module) -> None:
    """Turn ``sparse=True`` of the trainable embeddings in ``model`` off; rank 0 warns of it.

    The steps of SGD and Adagrad are the same.

    Args:
        model: The model, not sharded yet.
    """
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            module.sparse = False
            changed.append(name)
    if changed and dist.get_rank() == 0:
        warnings.warn(
            f"the gradients of {', '.join(map(repr, changed))} are dense, as FSDP2 reduces no sparse ones: `sparse` is "
            "now False; SparseAdam cannot train these, use Adam or Adagrad",
            stacklevel=2,
        )
