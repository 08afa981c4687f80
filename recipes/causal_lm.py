"""A causal language model of ``transformers`` as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from lightning_mics import start_from
from recipes.pretrained_folder import pretrained_folder


class CausalLM(L.LightningModule):
    """Predicts the next token.

    Batches are token windows ``[batch, length + 1]``: all but the last token are inputs, all but the first are targets.

    Args:
        network: The architecture, any of ``transformers``' configurations that have a causal language model.
        pretrained: Weights to start from: a folder that ``save_pretrained`` or ``lightning_mics.export`` has made, or a
            name on the hub; None draws them from the seed.
        optimizer: Makes the optimizer (and schedule) from the module, once its parameters are sharded.
        compile_blocks: ``torch.compile`` each transformer block.
        sample_tokens: How many tokens a sample of generated text has.
        temperature: Of the sample; below 1 the model keeps to what it finds likely.
    """

    def __init__(
        self,
        *,
        network: PretrainedConfig,
        optimizer: Callable[[nn.Module], OptimizerLRScheduler],
        pretrained: str | None = None,
        compile_blocks: bool = False,
        sample_tokens: int = 96,
        temperature: float = 0.7,
    ) -> None:
        super().__init__()
        self.config = network
        self.pretrained = pretrained
        self.make_optimizer = optimizer
        self.compile_blocks = compile_blocks
        self.sample_tokens = sample_tokens
        self.temperature = temperature
        self.network: nn.Module | None = None

    def check_data(self, *, vocab_size: int, sequence_length: int) -> None:
        """Raises ValueError if the network cannot take such data."""
        if vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.vocab_size={vocab_size} does not fit model.network.vocab_size={self.config.vocab_size}: "
                f"the model needs one output per token; set both to the same number"
            )
        if sequence_length > self.config.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={sequence_length} is longer than the {self.config.max_position_embeddings} "
                f"positions of the model; shorten it or raise the model's positions"
            )

    def configure_model(self) -> None:
        if self.network is not None:  # Lightning calls this before every fit, validate and predict
            return
        if self._trainer is None:  # by itself, as in `load_from_checkpoint`, which gives it its weights
            self.network = AutoModelForCausalLM.from_config(self.config)
            return
        with torch.device("meta"):  # the strategy gives each block its first weights when it shards it
            self.network = AutoModelForCausalLM.from_config(self.config)
        if self.pretrained is not None:
            start_from(self.network, pretrained_folder(self.pretrained))
        if self.compile_blocks:
            for module in self.network.modules():
                if type(module).__name__ in self.network._no_split_modules:
                    module.compile()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.make_optimizer(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocab]`` for tokens ``[batch, length]``."""
        return self.network(input_ids=tokens, use_cache=False).logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean negative log-likelihood, nats per token, of windows ``[batch, length + 1]``."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        # not averaged over ranks: that would cost a collective of all ranks in every micro-step
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Continue prompts ``[batch, length]`` by ``sample_tokens``.

        Every rank must make the same number of forward passes, for they gather parameters together: so no early end.
        """
        return self.network.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=self.sample_tokens,
            min_new_tokens=self.sample_tokens,
            do_sample=True,
            temperature=self.temperature,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the latest validation loss, so that a resumed run can show that it starts from it, and the tokenizer's
        folder, for ``python -m lightning_mics.export``.
        """
        if "val_loss" in self.trainer.callback_metrics:
            checkpoint["val_loss"] = self.trainer.callback_metrics["val_loss"].item()
        if tokenizer_folder := getattr(self.trainer.datamodule, "tokenizer_folder", None):
            checkpoint["tokenizer"] = str(tokenizer_folder)
