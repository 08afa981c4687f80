"""A causal language model of ``transformers`` as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from recipes.models.language_model import LanguageModel
from recipes.models.token_loss import nats_per_token


class CausalLM(LanguageModel):
    """Predicts the next token.

    Batches are token windows ``[batch, length + 1]``: all but the last token are inputs, all but the first are targets.

    Args:
        sample_tokens: Tokens of a sample of generated text, at most as many as the model has positions.
        temperature: Temperature of sampling; below 1 likely tokens become more likely.
        **options: Further arguments of :class:`~recipes.models.language_model.LanguageModel`.
    """

    objective = "causal"
    head = AutoModelForCausalLM

    def __init__(self, *, sample_tokens: int = 96, temperature: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.sample_tokens = sample_tokens
        self.temperature = temperature

    @staticmethod
    def sequences_in(batch: Tensor) -> int:
        return len(batch)

    @staticmethod
    def example_batch(sequences: int, sequence_length: int) -> Tensor:
        return torch.zeros(sequences, sequence_length + 1, dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]`` for tokens ``[batch, length]``."""
        return self.network(input_ids=tokens, use_cache=False).logits

    def loss_of(self, network: nn.Module, batch: Tensor) -> Tensor:
        """Mean negative log-likelihood, nats per token, of windows ``[batch, length + 1]``."""
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        return nats_per_token(logits.flatten(0, 1), batch[:, 1:].flatten()).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss_of(self.network, batch)
        # not averaged over ranks: that would cost a collective of all ranks in every micro-step
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(self.network, batch), prog_bar=True, sync_dist=True, batch_size=len(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Continue prompts ``[batch, length]`` by ``sample_tokens``.

        Every rank must make the same number of forward passes, for they gather parameters together: so no early end.
        """
        longest, prompt = self.longest_sequence, batch.shape[1]
        count = self.sample_tokens if longest is None else min(self.sample_tokens, longest - prompt)
        return self.network.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            temperature=self.temperature,
        )
