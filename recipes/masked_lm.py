"""A masked language model of ``transformers`` as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import AutoModelForMaskedLM

from recipes.language_model import LanguageModel

Batch = Mapping[str, Tensor]


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

    def sequences_in(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]`` for tokens ``[batch, length]``."""
        return self.network(input_ids=tokens).logits

    def masked_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[masked, vocab]`` in float32 and the tokens ``[masked]`` that were there."""
        masked = batch["labels"] != -100  # [batch, length]
        return self(batch["input_ids"])[masked].float(), batch["labels"][masked]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels = self.masked_logits(batch)
        loss = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))  # a batch may have none
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, labels = self.masked_logits(batch)
        self.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.val_masked_accuracy.update((logits.argmax(-1) == labels).float())
        self.log("val_loss", self.val_loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("val_masked_accuracy", self.val_masked_accuracy, prog_bar=True, batch_size=len(batch["input_ids"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """``input_ids`` with the most likely token in each place that ``labels`` asks for."""
        guesses = self(batch["input_ids"]).argmax(-1)
        return guesses.where(batch["labels"] != -100, batch["input_ids"])
