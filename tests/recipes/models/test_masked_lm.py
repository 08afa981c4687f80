from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig

from recipes.models.masked_lm import MaskedLM
from tests.support.trainers import make_trainer, on_ranks

NETWORK = BertConfig(
    vocab_size=30,
    max_position_embeddings=8,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


SEQUENCES = 16  # in each batch


MASKED = [5, 1, 0, 2]  # by batch: how many tokens of each sequence


def model() -> MaskedLM:
    return MaskedLM(network=NETWORK, optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    made = []
    for masked in MASKED:
        tokens = torch.randint(30, (SEQUENCES, 8))
        labels = torch.full_like(tokens, -100)
        labels[:, :masked] = tokens[:, :masked]
        made.append({"input_ids": tokens.masked_fill(labels != -100, 3), "labels": labels})
    return made


def test_loss_and_accuracy_are_means_over_masked_tokens_of_all_ranks(tmp_path: Path) -> None:
    two, four = (on_ranks(_validate, str(tmp_path), world, world_size=world)[0] for world in (2, 4))
    assert four == pytest.approx(two, rel=1e-5)
    assert 0 < two["val_masked_accuracy"] < 1
    assert two["val_loss"] == pytest.approx(math.log(30), rel=0.1)  # nothing is learned yet
    right = two["val_masked_accuracy"] * SEQUENCES * sum(MASKED)
    assert right == pytest.approx(round(right), abs=1e-4)


def _validate(folder: str, world: int) -> dict[str, float]:
    trainer = make_trainer(folder, devices=world, use_distributed_sampler=False)
    torch.manual_seed(0)
    module = model()
    rank = trainer.global_rank
    own = batches()[rank::world]
    (metrics,) = trainer.validate(module, DataLoader(own, batch_size=None), verbose=False)
    return dict(metrics)


def test_a_batch_without_masked_tokens_gives_a_loss_of_zero_and_gradients() -> None:
    module = model()
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.training_step(batches()[2], 0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None for n, p in module.named_parameters() if "position" in n)


def test_prediction_fills_masked_places_only() -> None:
    module = model()
    module.configure_model()
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=SimpleNamespace(mask_token_id=3)))
    tokens = torch.tensor([[5, 3, 7, 3], [1, 2, 4, 6]])
    filled = module.predict_step(tokens, 0)
    masked = tokens == 3
    assert torch.equal(filled[~masked], tokens[~masked])
    assert torch.equal(filled[masked], module(tokens).argmax(-1)[masked])
