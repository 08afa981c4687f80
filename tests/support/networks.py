"""Small networks of ``transformers``, each in a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from lightning_mics import load_pretrained
from tests.support.models import VOCAB, tokens

GPT = GPT2Config(
    vocab_size=VOCAB,
    n_positions=8,
    n_embd=6,
    n_layer=3,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)


BERT = BertConfig(
    vocab_size=VOCAB,
    hidden_size=6,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=13,
    max_position_embeddings=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


NETWORKS: dict[str, tuple[Any, Any]] = {
    "gpt": (GPT2LMHeadModel, GPT),
    "gpt without head": (GPT2Model, GPT),
    "bert": (BertForMaskedLM, BERT),
    "bert without head": (BertModel, BERT),
    "bert that classifies": (BertForSequenceClassification, BERT),
}


def make(kind: str, *, seed: int = 0) -> Any:
    """A whole network off the meta device."""
    torch.manual_seed(seed)
    network_class, config = NETWORKS[kind]
    return network_class(config).eval()


class NetworkModule(pl.LightningModule):
    """A network on the meta device, trained with SGD on its own labels."""

    def __init__(self, kind: str = "gpt", *, folder: Path | None = None, strict: bool = True, lr: float = 0.1) -> None:
        super().__init__()
        self.kind, self.folder, self.strict, self.lr = kind, folder, strict, lr
        self.network: nn.Module | None = None

    def configure_model(self) -> None:
        if self.network is not None:
            return
        network_class, config = NETWORKS[self.kind]
        with torch.device("meta"):
            self.network = network_class(config)
        if self.folder is not None:
            load_pretrained(self.network, self.folder, strict=self.strict)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = batch[:, 0] % 2 if "classifies" in self.kind else batch
        return self.network(input_ids=batch, labels=labels).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(input_ids=batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def same_batches() -> DataLoader[Any]:
    """One batch of 4 sequences, for predictions: every rank gets it whole."""
    return DataLoader(tokens(4, seed=3), batch_size=4)


__all__ = ["BERT", "GPT", "NETWORKS", "NetworkModule", "make", "same_batches"]
