"""A masked language model of ``transformers`` as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import AutoModelForMaskedLM

from recipes.models.language_model import LanguageModel
from recipes.models.token_loss import nats_per_token

Batch = Mapping[str, Tensor]


NOT_MASKED = -100  # the label of what is not to be predicted, which cross entropy leaves out


class MaskedLM(LanguageModel):
    """Predicts the tokens that were masked.

    Batches are those of ``transformers.DataCollatorForLanguageModeling``: ``input_ids`` and ``labels`` of
    ``[batch, length]``, where labels that are not to be predicted are -100.

    Validation logs ``val_loss``, nats per masked token, and ``val_masked_accuracy``, the share of them that the most
    likely token gets right. Both are means over all masked tokens of all ranks, which have different numbers of them.
    """

    objective = "masked"
    head = AutoModelForMaskedLM

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.val_loss = MeanMetric()
        self.val_masked_accuracy = MeanMetric()

    @staticmethod
    def sequences_in(batch: Batch) -> int:
        return len(batch["input_ids"])

    @staticmethod
    def example_batch(sequences: int, sequence_length: int) -> Batch:
        tokens = torch.zeros(sequences, sequence_length, dtype=torch.int64)
        return {"input_ids": tokens, "labels": tokens}

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]`` for tokens ``[batch, length]``."""
        return self.network(input_ids=tokens).logits

    def loss_of(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood, nats per masked token; zero if none is masked."""
        logits = network(input_ids=batch["input_ids"]).logits
        labels = batch["labels"]
        total = nats_per_token(logits.flatten(0, 1), labels.flatten()).sum()
        return total / (labels != NOT_MASKED).sum().clamp(min=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss_of(self.network, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=self.sequences_in(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        masked = batch["labels"] != NOT_MASKED  # [batch, length]
        logits, labels = self(batch["input_ids"])[masked], batch["labels"][masked]
        self.val_loss.update(nats_per_token(logits, labels))
        self.val_masked_accuracy.update((logits.argmax(-1) == labels).float())
        self.log("val_loss", self.val_loss, prog_bar=True, batch_size=self.sequences_in(batch))
        self.log("val_masked_accuracy", self.val_masked_accuracy, prog_bar=True, batch_size=self.sequences_in(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Tokens ``[batch, length]`` with the most likely token in each masked place."""
        masked = batch == self.trainer.datamodule.tokenizer.mask_token_id
        return self(batch).argmax(-1).where(masked, batch)
