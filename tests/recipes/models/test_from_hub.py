"""``model=hf``: any language model of ``transformers``, from a folder here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTConfig

from recipes.models.causal_lm import CausalLM
from recipes.models.from_hub import hf_model
from recipes.models.masked_lm import MaskedLM
from tests.support.trainers import make_trainer, on_ranks

GPT = GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)


BERT: dict[str, int] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(name: Path | str, *, pretrained: bool = True, objective: Any = "auto") -> Any:
    return hf_model(
        name=str(name),
        pretrained=pretrained,
        objective=objective,
        causal={"sample_tokens": 4},
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    )


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT).save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def test_after_zero_steps_logits_are_those_of_transformers_and_training_changes_them(gpt: Path, tmp_path: Path) -> None:
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(gpt)(tokens).logits
    for before, after, losses in on_ranks(_train_on, gpt, str(tmp_path / "run"), tokens, world_size=2):
        torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-6)
        assert (after - expected).abs().max() > 1e-3
        assert losses[-1] < losses[0]


def _train_on(gpt: Path, folder: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    module = made(gpt)
    losses: list[float] = []
    logits = []
    module.predict_step = lambda batch, batch_idx: module(batch)
    module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
    trainer = make_trainer(folder, devices=2, max_epochs=8, use_distributed_sampler=False)
    data = torch.utils.data.DataLoader(tokens, batch_size=2)
    for train in (False, True):
        if train:
            trainer.fit(module, data)
        logits.append(trainer.predict(module, data)[0])
    return logits[0], logits[1], losses


def test_what_a_model_was_made_for_is_what_it_is_trained_on(gpt: Path, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    assert isinstance(made(gpt), CausalLM)
    assert isinstance(made(tmp_path / "bert"), MaskedLM)
    BertConfig(**BERT).save_pretrained(tmp_path / "shape")  # no architectures
    assert isinstance(made(tmp_path / "shape", objective="causal"), CausalLM)


def test_a_fresh_model_takes_the_shape_only(gpt: Path) -> None:
    assert made(gpt, pretrained=False).pretrained is None
    assert made(gpt, pretrained=False).config.n_embd == 8


@pytest.mark.parametrize(
    ("files", "options", "error", "message"),
    [
        (None, {}, FileNotFoundError, "is not a folder; give a folder of transformers or a name on the hub"),
        ([], {}, FileNotFoundError, "has no config.json"),
        ([GPT], {"objective": "masked"}, ValueError, "transformers has no masked language model of 'gpt2'"),
        ([GPT], {"objective": "seq2seq"}, ValueError, "model.objective='seq2seq' is not one of 'auto', 'causal'"),
        ([BertConfig(**BERT)], {}, ValueError, "add model.objective=causal or model.objective=masked"),
        ([ViTConfig()], {"objective": "causal"}, ValueError, "transformers has no causal language model of 'vit'"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, files: list | None, options: dict, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for config in files:
            config.save_pretrained(folder)
    with pytest.raises(error, match=re.escape(message)):
        made(folder, **options)
